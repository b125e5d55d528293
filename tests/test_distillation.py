"""DMD2's equations against closed forms of Gaussians, and where their gradients go."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.errors import UserError
from linvideo_jax.flow import rectified
from linvideo_jax.transfer import distillation, guidance

# Three equally likely values with the normal distribution's first three moments: means over their
# pairs are exact for what is quadratic in (z, noise), as the gradients below are.
NODES = np.sqrt(1.5) * np.array([-1.0, 0.0, 1.0])
Z, NOISE = (
    np.array(column, np.float32).reshape(-1, 1, 1, 1, 1)
    for column in zip(*itertools.product(NODES, NODES), strict=True)
)


def velocity_of(mean, deviation):
    """The velocity of data N(mean, deviation^2): E[noise - x_0 | x_t]."""

    def velocity(x, t):
        t = t[:, None, None, None, None]
        rest = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
        return t * rest - (mean + (1 - t) * deviation**2 * rest)

    return velocity


def divergence(generator, teacher, t):
    """KL(q_t || p_t) of generator N(b, a^2) and teacher N(m, s^2), both noised to t."""
    (a, b), (s, m) = generator, teacher
    ours, theirs = ((1 - t) ** 2 * d**2 + t**2 for d in (a, s))
    return 0.5 * (ours / theirs + ((1 - t) * (b - m)) ** 2 / theirs - 1 - jnp.log(ours / theirs))


def times(t):
    return jnp.full(len(Z), t)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.625, 0.98])
@pytest.mark.parametrize("generator", [(0.5, 1.5), (2.0, -0.3), (1.2, 0.4)])
def test_expected_generator_gradient_is_that_of_the_divergence(generator, t):
    """With the exact fake score and without the normaliser, up to t^2 / (1 - t)^2."""
    teacher = (1.2, 0.4)

    def loss(params):
        a, b = params
        fake = velocity_of(*reversed(generator))
        p = velocity_of(*reversed(teacher))
        return distillation.generator_loss(a * Z + b, NOISE, times(t), fake, p, normalise=False)

    params = jnp.array(generator)
    ours = jax.grad(loss)(params)
    exact = t**2 / (1 - t) ** 2 * jax.grad(divergence)(params, teacher, t)
    np.testing.assert_allclose(ours, exact, rtol=2e-4, atol=2e-5)
    assert (np.abs(ours).max() < 1e-5) == (generator == teacher)


def test_descent_on_the_generators_loss_finds_the_teacher():
    """Both networks exact, at times drawn as in training: the family's N(b, a^2) becomes p."""
    teacher, params = (1.2, 0.4), jnp.array([0.5, 1.5])

    @jax.jit
    def step(params, key):
        t = jnp.repeat(distillation.draw_times(key, 1, 5.0), len(Z))

        def loss(params):
            fake = velocity_of(*reversed(jax.lax.stop_gradient(params)))
            x_0 = params[0] * Z + params[1]
            return distillation.generator_loss(x_0, NOISE, t, fake, velocity_of(0.4, 1.2))

        return params - 0.02 * jax.grad(loss)(params)

    for i in range(1500):
        params = step(params, jax.random.key(i))
    np.testing.assert_allclose(params, teacher, atol=0.02)


def test_the_normaliser_divides_each_sample_by_its_distance():
    shape = (2, 1, 2, 1, 3)
    x_0, noise = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    t = np.array([0.3, 0.8], np.float32)
    fake, teacher = velocity_of(0.1, 0.7), velocity_of(0.4, 1.2)
    grads = {
        normalise: jax.grad(distillation.generator_loss)(x_0, noise, t, fake, teacher, normalise)
        for normalise in (False, True)
    }
    x_t = rectified.interpolate(x_0, noise, t)
    mu = [rectified.x0_from_velocity(x_t, v(x_t, t), t) for v in (fake, teacher)]
    np.testing.assert_allclose(grads[False], (mu[0] - mu[1]) / x_0.size, rtol=1e-5, atol=1e-7)
    size = np.abs(x_0 - mu[1]).reshape(2, -1).mean(1).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(grads[True], grads[False] / size, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_the_fake_scores_minimiser_is_the_velocity_of_the_samples(t):
    """Of all velocities c x + d at this t, with samples N(b, a^2): the known one, and no other."""
    a, b = 0.6, -1.1
    x_0 = a * Z + b

    def loss(params):
        velocity = lambda x, t: params[0] * x + params[1]  # noqa: E731
        return distillation.fake_score_loss(velocity, x_0, NOISE, times(t))

    exact = velocity_of(b, a)
    at = jnp.zeros((1, 1, 1, 1, 1)), jnp.ones((1, 1, 1, 1, 1))
    low, high = (float(exact(x, jnp.full(1, t)).ravel()[0]) for x in at)
    known = jnp.array([high - low, low])
    np.testing.assert_allclose(jax.grad(loss)(known), 0.0, atol=2e-6)
    assert np.all(np.linalg.eigvalsh(jax.hessian(loss)(known)) > 0), "the minimum is the only one"


def test_gradients_reach_the_trained_network_alone():
    def loss(params):
        x_0 = params["generator"] * Z
        fake, teacher = (lambda x, t, n=name: params[n] * x for name in ("fake", "teacher"))
        return distillation.generator_loss(x_0, NOISE, times(0.5), fake, teacher)

    params = {"generator": 0.5, "fake": 0.3, "teacher": -0.2}
    grads = jax.grad(loss)(params)
    assert grads["fake"] == grads["teacher"] == 0.0 and abs(grads["generator"]) > 1e-3

    def critic(params):
        fake = lambda x, t: params["fake"] * x  # noqa: E731
        return distillation.fake_score_loss(fake, params["generator"] * Z, NOISE, times(0.5))

    grads = jax.grad(critic)(params)
    assert grads["generator"] == 0.0 and abs(grads["fake"]) > 1e-3


@pytest.mark.parametrize("exit_step", range(4))
def test_backward_simulation_is_a_plain_loop_with_fresh_noise(exit_step):
    sigmas = np.array([1.0, 0.9, 0.75, 0.5, 0.0])
    noise = np.random.default_rng(1).normal(size=(3, 1, 2, 2, 1)).astype(np.float32)
    keys, generator = jax.random.split(jax.random.key(5), 3), velocity_of(0.3, 0.8)
    x, t = jax.jit(
        lambda step: distillation.backward_simulation(generator, noise, sigmas, step, keys)
    )(exit_step)
    wanted = noise
    for i in range(exit_step):
        here, after = np.float32(sigmas[i]), np.float32(sigmas[i + 1])
        x_0 = wanted - here * generator(wanted, jnp.full(3, here))
        fresh = [jax.random.normal(jax.random.fold_in(key, i), noise.shape[1:]) for key in keys]
        wanted = (1 - after) * x_0 + after * jnp.stack(fresh)
    np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(t, sigmas[exit_step], rtol=1e-6)


def test_nothing_flows_back_through_the_simulation():
    def loss(scale):
        x, _ = distillation.backward_simulation(
            lambda x, t: scale * x, jnp.asarray(NOISE), np.array([1, 0.5, 0]), 1,
            jax.random.split(jax.random.key(0), len(NOISE)),
        )  # fmt: skip
        return jnp.sum(x)

    assert jax.grad(loss)(0.7) == 0.0


def test_the_start_ends_where_the_teacher_leads_and_else_at_the_mean():
    """(noise - x_0) / t has no error; a constant velocity does best at its mean: the blur."""
    t, x_0 = 0.9, 0.3 * Z + 0.1 * NOISE
    exact = (NOISE - x_0) / t

    def loss(constant, velocity=exact):
        return distillation.regression_loss(lambda x, t: velocity + constant, NOISE, times(t), x_0)

    np.testing.assert_allclose(loss(0.0), 0.0, atol=1e-12)
    np.testing.assert_allclose(loss(0.5), (t * 0.5) ** 2, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(0.5), 2 * t**2 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(exact.mean(), 0.0), 0.0, atol=1e-6)
    assert jax.grad(loss)(exact.mean() + 0.1, 0.0) > 0.1


def test_times_are_shifted_and_clamped():
    t = np.asarray(distillation.draw_times(jax.random.key(0), 20_000, 5.0))
    assert t.min() == np.float32(0.02) and t.max() == np.float32(0.98)
    # The median of shift(u) is shift(1/2).
    assert abs(np.median(t) - 5 * 0.5 / 3) < 0.01
    even = np.asarray(distillation.draw_times(jax.random.key(0), 20_000, 1.0))
    assert abs(even.mean() - 0.5) < 0.01


def test_guidance_scales_of_both_conventions():
    """CausVid's 3.5 is FastVideo's modular 4.5; Self-Forcing's 3.0 is 4.0."""
    cond, uncond = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    for theirs in (0.0, 3.0, 3.5):
        ours = distillation.standard_guidance(theirs, "from_conditional")
        assert ours == theirs + 1
        np.testing.assert_allclose(
            rectified.guided(cond, uncond, ours), cond + theirs * (cond - uncond)
        )
    assert distillation.standard_guidance(4.5) == 4.5
    with pytest.raises(UserError, match="is 'theirs': choose one of standard, from_conditional"):
        distillation.standard_guidance(3.0, "theirs")


def test_guided_teacher_puts_both_halves_in_one_batch():
    def network(x, t, text, lengths):
        return x * text[:, :1, None, None, None].reshape(-1, 1, 1, 1, 1) + lengths.reshape(
            -1, 1, 1, 1, 1
        )

    x, t = jnp.ones((2, 1, 1, 1, 1)), jnp.full(2, 0.5)
    text = jnp.array([[1.0], [2.0]]), jnp.array([1, 2])
    negative = jnp.array([[5.0], [5.0]]), jnp.array([7, 7])
    u = guidance.guided(network, text, negative, 3.0)(x, t)
    np.testing.assert_allclose(u.ravel(), [12 + 3 * (2 - 12), 12 + 3 * (4 - 12)])
