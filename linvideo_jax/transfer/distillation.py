"""DMD2 (Yin et al. 2024) for a rectified flow: a generator of a few steps, without data.

A step of the generator is one prediction of x_0 from x_t, x_0 = x_t - t u(x_t, t); between two
steps fresh noise is added. It is trained so that its samples, noised to any t, are distributed as
the teacher's, whose guided velocity is the score of the one and a network trained along on the
generator's samples (the fake score) that of the other. Velocities are functions (x, t) -> u.
Equations as in CausVid, Self-Forcing and FastVideo, whose flow forms agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from linvideo_jax.errors import UserError
from linvideo_jax.flow import rectified, solvers
from linvideo_jax.transfer.objectives import Latents, Times, Velocity, flow_matching

__all__ = [
    "backward_simulation",
    "draw_times",
    "fake_score_loss",
    "generator_loss",
    "regression_loss",
    "standard_guidance",
]

CONVENTIONS = ("standard", "from_conditional")

# The fake score's loss is flow matching on constant samples of the generator, unweighted.
fake_score_loss = flow_matching


def standard_guidance(guidance_scale: float, convention: str = "standard") -> float:
    """A guidance scale w as this project means it: uncond + w (cond - uncond), where 1 is none.

    convention "from_conditional": the scale is that of cond + w (cond - uncond), as CausVid,
    Self-Forcing and FastVideo's older pipeline write it, which is one less: their 3.0 is 4.0 here.
    UserError for another convention.
    """
    if convention not in CONVENTIONS:
        raise UserError(
            f"distill.guidance_convention is {convention!r}: choose one of "
            f"{', '.join(CONVENTIONS)}."
        )
    return guidance_scale + (convention == "from_conditional")


def draw_times(
    key: jax.Array, batch_size: int, flow_shift: float, lowest: float = 0.02, highest: float = 0.98
) -> Times:
    """Times at which samples are noised: uniform, shifted as the sampler's grid is, then clamped.

    The codes draw t of 1000 steps and clamp it to [20, 980]: at 0 scores do not exist, at 1 the
    sample is forgotten.
    """
    uniform = jax.random.uniform(key, (batch_size,))
    return jnp.clip(rectified.shift_time(uniform, flow_shift), lowest, highest)


def backward_simulation(
    generator: Velocity,
    noise: Latents,
    sigmas: Float[np.ndarray, " steps+1"],
    exit_step: Int[Array, ""] | int,
    keys: Key[Array, " batch"],
) -> tuple[Latents, Times]:
    """(x_t, t) that the generator meets at step `exit_step` (from 0) of its own few-step sampling.

    Steps before it run as the sampler "renoise" does, each an x_0 and fresh noise on top, without
    a gradient. The generator so trains on its own states and no data are needed (DMD2, section
    4.5). Only steps that are needed run. keys: one a sample, as
    `solvers.sample` takes them.
    """
    grid = jnp.asarray(sigmas, jnp.float32)

    def step(i, x):
        t = jnp.full(x.shape[:1], grid[i])
        x_0 = rectified.x0_from_velocity(x, generator(x, t), t)
        return rectified.interpolate(x_0, solvers.renoise_noise(keys, i, x), grid[i + 1])

    x = jax.lax.fori_loop(0, exit_step, step, noise)
    return jax.lax.stop_gradient(x), jnp.full(noise.shape[:1], grid[exit_step])


def generator_loss(
    x_0: Latents,
    noise: Latents,
    t: Times,
    fake: Velocity,
    teacher: Velocity,
    normalise: bool | Array = True,
) -> Float[Array, ""]:
    """A scalar whose gradient by x_0 is that of KL(q_t || p_t) up to a positive factor, over n.

    With mu = x_t - t u(x_t, t) of both networks at x_t = (1 - t) x_0 + t noise, and
    d = mu_fake - mu_teacher, it is mean((x_0 - sg(x_0 - d))^2) / 2 over batch and elements, so its
    gradient is d / n. As d = t^2 / (1 - t) (s_fake - s_teacher), its expectation over a batch is
    t^2 / (1 - t)^2 times the KL's gradient. normalise: divide d by each sample's
    mean |x_0 - mu_teacher|, DMD's weight, which makes all t count alike. No gradient reaches either
    network. teacher: with its guidance.
    """
    sample = jax.lax.stop_gradient(x_0)
    x_t = rectified.interpolate(sample, noise, t)
    mu_fake = rectified.x0_from_velocity(x_t, fake(x_t, t), t)
    mu_teacher = rectified.x0_from_velocity(x_t, teacher(x_t, t), t)
    size = jnp.mean(jnp.abs(sample - mu_teacher), axis=(1, 2, 3, 4), keepdims=True)
    direction = (mu_fake - mu_teacher) / jnp.where(normalise, jnp.maximum(size, 1e-6), 1.0)
    target = jax.lax.stop_gradient(sample - direction)
    return 0.5 * jnp.mean(jnp.square(x_0 - target))


def regression_loss(
    generator: Velocity, noise: Latents, t: Times, x_0: Latents
) -> Float[Array, ""]:
    """How far the generator's x_0 from pure noise is from the teacher's sample of the same noise.

    The mean square over batch and elements: DMD's regression, and CausVid's start on the teacher's
    trajectories, for the first step alone. t: of the first step, near 1.
    """
    return jnp.mean(jnp.square(rectified.x0_from_velocity(noise, generator(noise, t), t) - x_0))
