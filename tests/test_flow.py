"""Grids, solvers and identities of rectified flow against diffusers, and against themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from linvideo_jax import checkpoints
from linvideo_jax.flow import grids, rectified, solvers

STEPS = (1, 2, 3, 8, 50)
NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)


def unipc_scheduler(flow_shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=flow_shift,
        solver_order=2,
    )


def dpm_scheduler(flow_shift):
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def velocity_of(library):
    """A velocity that is nonlinear in the state and in time, for torch or jax arrays."""
    return lambda x, t: library.sin(2 * x + 3 * t) + 0.3 * x * t - 0.2 * library.tanh(x) * x


def scheduler_run(scheduler):
    """All states of diffusers' loop; the velocity sees the scheduler's own timesteps."""
    x, states = torch.from_numpy(NOISE), []
    for t in scheduler.timesteps:
        states.append(x.numpy())
        x = scheduler.step(velocity_of(torch)(x, t.float() / 1000), t, x, return_dict=False)[0]
    return np.stack([*states, x.numpy()])


def our_run(sigmas, sampler):
    times = grids.network_timesteps(sigmas, sampler) / 1000
    run = jax.jit(
        lambda noise: solvers.sample(
            velocity_of(jnp), noise, sigmas, sampler, trajectory=True, times=times
        )
    )
    final, seen = run(NOISE)
    assert seen.velocities.shape == seen.states.shape == (len(sigmas) - 1, *NOISE.shape)
    assert final.dtype == jnp.float32
    return np.concatenate([seen.states, final[None]])


def relative_error(ours, theirs):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_follows_diffusers(steps, flow_shift):
    scheduler = unipc_scheduler(flow_shift)
    scheduler.set_timesteps(steps)
    sigmas = grids.sigma_grid(steps, flow_shift)
    np.testing.assert_array_equal(sigmas.astype(np.float32), scheduler.sigmas.numpy())
    assert relative_error(our_run(sigmas, "unipc"), scheduler_run(scheduler)) < 1e-5


@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_follows_diffusers(steps, flow_shift):
    scheduler = dpm_scheduler(flow_shift)
    scheduler.set_timesteps(steps)
    sigmas = grids.sigma_grid(steps, flow_shift, sampler="dpm++")
    np.testing.assert_array_equal(sigmas.astype(np.float32), scheduler.sigmas.numpy())
    assert relative_error(our_run(sigmas, "dpm++"), scheduler_run(scheduler)) < 1e-5


@pytest.mark.parametrize("sampler", ["unipc", "dpm++"])
def test_original_grid_in_the_steps_of_diffusers(sampler):
    """Wan's own grid, which for dpm++ starts at pure noise, put into diffusers' scheduler."""
    scheduler = {"unipc": unipc_scheduler, "dpm++": dpm_scheduler}[sampler](8.0)
    scheduler.set_timesteps(8)
    sigmas = grids.sigma_grid(8, 8.0, "original", sampler)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(grids.network_timesteps(sigmas, sampler)).to(torch.int64)
    assert relative_error(our_run(sigmas, sampler), scheduler_run(scheduler)) < 1e-5


@pytest.mark.parametrize("steps", STEPS)
def test_euler_follows_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1e-3, steps + 1)[:-1])
    sigmas = grids.sigma_grid(steps, 3.0)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=2e-6)
    assert relative_error(our_run(sigmas, "euler"), scheduler_run(scheduler)) < 1e-5


def test_network_timesteps_are_those_of_diffusers():
    for flow_shift in (1.0, 3.0, 5.0, 8.0):
        for sampler, make in (("unipc", unipc_scheduler), ("dpm++", dpm_scheduler)):
            scheduler = make(flow_shift)
            for steps in range(1, 101):
                scheduler.set_timesteps(steps)
                sigmas = grids.sigma_grid(steps, flow_shift, sampler=sampler)
                ours = grids.network_timesteps(sigmas, sampler)
                np.testing.assert_array_equal(ours, scheduler.timesteps.numpy())


def test_grids_of_both_codes():
    """Figures of Wan's fm_solvers_unipc.py, fm_solvers.py and of diffusers, shift 5, 50 steps."""

    def times(kind, sampler):
        return grids.network_timesteps(grids.sigma_grid(50, 5.0, kind, sampler), sampler).tolist()

    unipc = times("original", "unipc")
    assert unipc[:3] == [999, 995, 991] and unipc[-2:] == [172, 92]
    dpm = times("original", "dpm++")
    assert dpm[:3] == [1000, 995, 991] and dpm[-2:] == [172, 92]
    sigmas = 1000 * grids.sigma_grid(50, 5.0)
    np.testing.assert_allclose(sigmas[:3], [999.999, 995.94, 991.74], atol=0.01)
    np.testing.assert_allclose(sigmas[-3:], [175.97, 96.78, 0], atol=0.01)


def test_straight_flow_is_solved_exactly():
    """From any number of steps: a velocity that does not change along the path has no error."""
    data = NOISE[::-1].copy()
    for sampler in ("unipc", "euler", "dpm++"):
        for steps in (1, 2, 7):
            sigmas = grids.sigma_grid(steps, 3.0)
            final = solvers.sample(lambda x, t: (x - data) / t, NOISE, sigmas, sampler)
            np.testing.assert_allclose(final, data, atol=1e-5)


def test_multistep_is_more_accurate_than_euler():
    def final(sampler, steps):
        return np.asarray(
            solvers.sample(velocity_of(jnp), NOISE, grids.sigma_grid(steps, 3.0), sampler)
        )

    exact = final("unipc", 200)
    error = {s: np.abs(final(s, 20) - exact).mean() for s in ("unipc", "euler", "dpm++")}
    assert error["unipc"] < 0.5 * error["euler"] and error["dpm++"] < 0.5 * error["euler"]


@pytest.mark.parametrize(
    ("flow_shift", "figures"),
    [(5, [1000, 937.5, 833.3, 625]), (8, [1000, 960, 888.9, 727.3]), (3, [1000, 900, 750, 500])],
)
def test_warped_lists_of_distilled_models(flow_shift, figures):
    """The figures of Self-Forcing (5), CausVid (8) and FastVideo's 14B (3), of four even steps."""
    listed = grids.sigma_grid(4, flow_shift, denoising_steps=(1000, 750, 500, 250))
    even = grids.sigma_grid(4, flow_shift, sampler="renoise")
    np.testing.assert_allclose(1000 * listed[:-1], figures, atol=0.05)
    np.testing.assert_allclose(even, listed, rtol=1e-12)
    assert listed[0] == 1.0 and listed[-1] == 0.0
    for sampler in solvers.FEW_STEP_SAMPLERS:
        told = grids.network_timesteps(listed, sampler)
        np.testing.assert_allclose(told, 1000 * listed[:-1], rtol=1e-6)


def test_renoise_is_a_plain_loop_with_noise_of_each_samples_own_key():
    sigmas, velocity = grids.warped((1000, 757, 522), 1.0), velocity_of(jnp)
    keys = jax.vmap(jax.random.key)(jnp.array([3, 8], jnp.uint32))

    @jax.jit
    def run(noise, keys):
        return solvers.sample(velocity, noise, sigmas, "renoise", keys=keys, trajectory=True)

    final, seen = run(NOISE, keys)
    x = NOISE
    for i, (here, after) in enumerate(itertools.pairwise(sigmas)):
        np.testing.assert_allclose(seen.states[i], x, rtol=1e-4, atol=1e-5)
        x_0 = x - here * velocity(x, np.float32(here))
        fresh = [jax.random.normal(jax.random.fold_in(k, i), NOISE.shape[1:]) for k in keys]
        x = (1 - after) * x_0 + after * np.stack(fresh)
    np.testing.assert_allclose(final, x, rtol=1e-4, atol=1e-5)
    alone, _ = run(NOISE[1:], keys[1:])
    swapped, _ = run(NOISE[::-1].copy(), keys[::-1])
    np.testing.assert_allclose(alone[0], final[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(swapped, final[::-1], rtol=1e-5, atol=1e-6)


def test_euler_hop_over_a_list_is_a_plain_loop_and_what_diffusers_does():
    """x <- x_0 + s_next u; diffusers' UniPC without history, as a distilled model is exported."""
    sigmas, velocity = grids.warped((1000, 750, 500, 250), 5.0), velocity_of(jnp)
    states = our_run(sigmas, "euler")
    x = NOISE
    for i, (here, after) in enumerate(itertools.pairwise(sigmas)):
        u = velocity(x, np.float32(here))
        x = (x - here * u) + after * u
        np.testing.assert_allclose(states[i + 1], x, rtol=1e-4, atol=1e-5)
    scheduler = UniPCMultistepScheduler.from_config(checkpoints.few_step_scheduler(5.0, 4))
    scheduler.set_timesteps(4)
    np.testing.assert_allclose(scheduler.sigmas, sigmas, atol=1e-3)
    # diffusers tells the network whole timesteps: 937 for 937.5.
    assert relative_error(states, scheduler_run(scheduler)) < 5e-3


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="renoise needs a key for each sample"):
        solvers.sample(velocity_of(jnp), NOISE, grids.sigma_grid(2, 3.0), "renoise")
    with pytest.raises(ValueError, match="unipc, euler, dpm"):
        solvers.sample(velocity_of(jnp), NOISE, grids.sigma_grid(2, 3.0), "heun")
    with pytest.raises(ValueError, match="diffusers, original"):
        grids.sigma_grid(2, 3.0, "karras")
    with pytest.raises(ValueError, match="steps >= 1"):
        grids.sigma_grid(0, 3.0)


def test_identities():
    x0, noise, t = NOISE, NOISE[::-1].copy(), np.array([0.3, 0.8], np.float32)
    x, u = rectified.interpolate(x0, noise, t), noise - x0
    np.testing.assert_allclose(rectified.x0_from_velocity(x, u, t), x0, atol=1e-5)
    np.testing.assert_allclose(rectified.guided(u, x0, 1.0), u, atol=1e-6)
    assert rectified.shift_time(0.5, 3.0) == 0.75
