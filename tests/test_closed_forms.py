"""Objectives against closed forms: a Gaussian teacher, a linear student, and a small mixture.

Parameters are shared over t. Where an expectation is quadratic in a centred Gaussian, its two
points at one standard deviation give it exactly.
"""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from linvideo_jax.flow import grids
from linvideo_jax.transfer import objectives, samples

S = 0.6  # standard deviation of the teacher's data
B = 0.35  # the student's velocity is B x
T_FROM, T_TO = 0.8, 0.55


def variance(t, s=S):
    """Of the teacher's marginal."""
    return (1 - t) ** 2 * s**2 + t**2


def of_gaussian(variance, t):
    """a with u = a x for N(0, variance), t < 1: its score -x / variance is -(x + (1 - t) u) / t."""
    return (t / variance - 1) / (1 - t)


def linear(coefficient):
    return lambda x, t: coefficient * x


def teacher(x, t):
    t = t[:, None, None, None, None]
    return of_gaussian(variance(t), t) * x


def latents(values):
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1, 1)


def adm(b, score, weighting="paper"):
    x = latents([1.0, -1.0]) * variance(T_FROM) ** 0.5
    t_from, t_to = jnp.full(2, T_FROM), jnp.full(2, T_TO)
    return objectives.anytime_distribution_matching(
        linear(b), score, teacher, x, t_from, t_to, weighting
    )[0]


def kl(q, p):
    """KL(N(0, q) || N(0, p))."""
    return 0.5 * (q / p - 1 - jnp.log(q / p))


M = 1 + (T_TO - T_FROM) * B  # the student's point is M x


def test_adm_with_the_exact_scores_has_the_gradient_of_the_divergence():
    q = M**2 * variance(T_FROM)  # variance of the student's point
    gradient = jax.grad(adm)(B, linear(of_gaussian(q, T_TO)))
    by_hand = (T_TO - T_FROM) * M * variance(T_FROM) * (1 / variance(T_TO) - 1 / q)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4)

    def divergence(b):
        return kl((1 + (T_TO - T_FROM) * b) ** 2 * variance(T_FROM), variance(T_TO))

    np.testing.assert_allclose(gradient, jax.grad(divergence)(B), rtol=1e-4)


@pytest.mark.parametrize("b", [B, -0.2, 0.9])
def test_adm_with_the_students_own_score(b):
    """What the paper's equation 13 puts in place of the divergence's gradient."""
    a, m = of_gaussian(variance(T_TO), T_TO), 1 + (T_TO - T_FROM) * b
    by_hand = (T_TO - T_FROM) * m * variance(T_FROM) * (1 - T_TO) / T_TO * (a - b)
    np.testing.assert_allclose(jax.grad(adm)(b, linear(b)), by_hand, rtol=1e-4)


@pytest.mark.parametrize("b", [B, -0.2, 0.9])
def test_the_papers_approximation(b):
    """docs/method.md: (a) - (b) is how far b(t) is from the velocity of the student's points."""
    m = 1 + (T_TO - T_FROM) * b
    fitting = of_gaussian(m**2 * variance(T_FROM), T_TO)
    exact, own = (jax.grad(adm)(b, linear(c)) for c in (fitting, b))
    by_hand = (T_TO - T_FROM) * m * variance(T_FROM) * (1 - T_TO) / T_TO * (b - fitting)
    np.testing.assert_allclose(exact - own, by_hand, rtol=1e-3)


def test_with_parameters_of_its_own_for_every_step_the_printed_form_never_settles():
    """The lowest step's error stays, and those above it grow; the anchor ends that."""
    t = jnp.array([0.9, 0.7, 0.5, 0.3, 0.1])
    a = of_gaussian(variance(t), t)

    def descend(beta, updates):
        def loss(b, frozen):
            # b[i] is the velocity's coefficient at t[i]; the two points of every marginal.
            x = latents([1.0, -1.0])
            total = 0.0
            for i in range(4):
                here, to = jnp.full(2, t[i]), jnp.full(2, t[i + 1])
                state = x * variance(t[i]) ** 0.5
                matching, u = objectives.anytime_distribution_matching(
                    linear(b[i]), linear(frozen[i + 1]), linear(a[i + 1]), state, here, to, "paper"
                )
                total += matching + beta * objectives.velocity_matching(u, a[i] * state)
            state = x * variance(t[4]) ** 0.5
            return total + beta * objectives.velocity_matching(b[4] * state, a[4] * state)

        def update(b, _):
            return b - 0.1 * jax.grad(loss)(b, b), None

        return jax.lax.scan(update, a - 0.1, None, updates)[0] - a

    for updates, at_least in ((100, 0.3), (500, 5.0)):
        printed = jnp.abs(descend(0.0, updates))
        np.testing.assert_allclose(printed[4], 0.1, rtol=1e-4)
        assert jnp.max(printed) > at_least
    assert jnp.max(jnp.abs(descend(1.0, 500))) < 1e-3


@pytest.mark.parametrize("weighting", ["paper", "clipped"])
def test_a_teacher_matched_with_itself_gives_zero(weighting):
    a = of_gaussian(variance(T_TO), T_TO)
    assert jax.grad(adm)(a, teacher, weighting) == 0
    x = latents([0.3, -1.2])
    noise, t = latents([1.0, 0.5]), jnp.array([0.3, 0.7])

    def dmd(x):
        return objectives.distribution_matching_at_zero(x, noise, t, teacher, teacher, weighting)

    np.testing.assert_array_equal(jax.grad(dmd)(x), 0)
    u = teacher(x, t)
    np.testing.assert_array_equal(jax.grad(objectives.velocity_matching)(u, u), 0)


def test_mse_is_a_regression_on_the_velocity():
    x = latents([1.0, -1.0]) * variance(T_FROM) ** 0.5
    t = jnp.full(2, T_FROM)
    a = of_gaussian(variance(T_FROM), T_FROM)
    gradient = jax.grad(lambda b: objectives.velocity_matching(b * x, teacher(x, t)))(B)
    np.testing.assert_allclose(gradient, 2 * (B - a) * variance(T_FROM), rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_dmd_has_the_gradient_of_the_divergence_of_noised_samples(steps, t):
    """From noise at t = 1 the student's sample is (1 - B / steps)^steps x_1."""
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=2)))
    start, noise = latents(signs[:, 0]), latents(signs[:, 1])
    times = jnp.full(4, t)

    def scale(b):
        return (1 - b / steps) ** steps

    q = variance(t, scale(B))

    def loss(b):
        x_0, _ = objectives.rollout(linear(b), start, jnp.ones(4), steps)
        score = linear(of_gaussian(q, t))
        return objectives.distribution_matching_at_zero(x_0, noise, times, score, teacher, "paper")

    def divergence(b):
        return kl(variance(t, scale(b)), variance(t))

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(B), jax.grad(divergence)(B), rtol=1e-4)


def test_rollout_returns_the_first_velocity_for_the_anchor():
    x = latents([1.0, -0.5])
    x_0, first = objectives.rollout(linear(B), x, jnp.array([1.0, 0.4]), 2)
    np.testing.assert_allclose(first, B * x, rtol=1e-6)
    np.testing.assert_allclose(x_0, latents([0.825**2, -0.5 * 0.93**2]), rtol=1e-6)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_the_score_networks_loss_is_least_at_the_samples_own_velocity(t):
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=2)))
    x_0, noise = 0.8 * latents(signs[:, 0]), latents(signs[:, 1])
    least = of_gaussian(variance(t, 0.8), t)

    def loss(c):
        return objectives.flow_matching(linear(c), x_0, noise, jnp.full(4, t))

    np.testing.assert_allclose(jax.grad(loss)(least), 0, atol=1e-6)
    gradient = 2 * (B - least) * variance(t, 0.8)
    np.testing.assert_allclose(jax.grad(loss)(B), gradient, rtol=1e-4)


def test_constants_receive_no_gradient():
    x, noise, t = latents([0.3, -1.2]), latents([1.0, 0.5]), jnp.array([0.3, 0.7])

    def adm_of(coefficient, stored_t=t):
        score = target = linear(coefficient)
        return objectives.anytime_distribution_matching(
            linear(B), score, target, x, stored_t + 0.1, stored_t, "paper"
        )[0]

    def dmd_of(coefficient):
        score = target = linear(coefficient)
        return objectives.distribution_matching_at_zero(x, noise, t, score, target, "paper")

    def stored(u):
        return objectives.velocity_matching(B * x, u)

    def critics_sample(x_0):
        return objectives.flow_matching(linear(B), x_0, noise, t)

    assert jax.grad(adm_of)(0.2) == 0 and jax.grad(dmd_of)(0.2) == 0
    np.testing.assert_array_equal(jax.grad(stored)(x), 0)
    np.testing.assert_array_equal(jax.grad(critics_sample)(x), 0)


# A mixture of four modes in two dimensions, whose velocity is known, and a network too small for it
MODES = 1.5 * np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.3]])
WIDTH, STEPS, PATHS = 16, 12, 512
SIGMAS = grids.sigma_grid(STEPS, 3.0).astype(np.float32)


def mixture(x, t):
    t = t[:, None, None]
    v = variance(t, 0.2)
    from_mean = x.reshape(-1, 1, 2) - (1 - t) * MODES
    share = jax.nn.softmax(-jnp.sum(from_mean**2, -1) / (2 * v[..., 0]))[..., None]
    slope = (t - (1 - t) * 0.2**2) / v  # `of_gaussian`, also at t = 1
    return jnp.sum(share * (slope * from_mean - MODES), 1).reshape(x.shape)


def small_network(params, x, t):
    t = t[:, None]
    inputs = jnp.concatenate([x.reshape(-1, 2), t, jnp.sin(3 * t), jnp.cos(3 * t)], -1)
    return (jnp.tanh(inputs @ params["in"] + params["bias"]) @ params["out"]).reshape(x.shape)


def trajectories(key):
    """(states, velocities) of the teacher, [steps, paths, 1, 1, 1, 2]."""

    def step(x, i):
        u = mixture(x, jnp.full(PATHS, jnp.asarray(SIGMAS)[i]))
        return x + (jnp.asarray(SIGMAS)[i + 1] - jnp.asarray(SIGMAS)[i]) * u, (x, u)

    return jax.lax.scan(step, jax.random.normal(key, (PATHS, 1, 1, 1, 2)), jnp.arange(STEPS))[1]


def error(params, pairs):
    t = jnp.repeat(jnp.asarray(SIGMAS[:-1]), PATHS)
    x, u = (values.reshape(-1, 1, 1, 1, 2) for values in pairs)
    return objectives.velocity_matching(small_network(params, x, t), u)


@jax.jit
def trained(params, beta, matching, rate, key, pairs, as_printed):
    """2,000 updates by matching ADM + beta anchor, t the next lower step."""

    def loss(params, key):
        rows, columns = jax.random.split(key)
        i = jax.random.randint(rows, (64,), 0, STEPS)
        j = jax.random.randint(columns, (64,), 0, PATHS)
        sigmas, frozen = jnp.asarray(SIGMAS), jax.lax.stop_gradient(params)

        def adm(weighting):
            return objectives.anytime_distribution_matching(
                lambda x, t: small_network(params, x, t),
                lambda x, t: small_network(frozen, x, t),
                mixture,
                pairs[0][i, j],
                sigmas[i],
                sigmas[i + 1],
                weighting,
            )

        (printed, u), (clipped, _) = adm("paper"), adm("clipped")
        value = jnp.where(as_printed, printed, clipped)
        return matching * value + beta * objectives.velocity_matching(u, pairs[1][i, j])

    def update(carry, key):
        params, moments = carry
        changes, moments = optimizer.update(jax.grad(loss)(params, key), moments)
        params = jax.tree.map(lambda p, c: p + rate * c, params, changes)
        return (params, moments), None

    optimizer = optax.adam(1.0)
    keys = jax.random.split(key, 2000)
    return jax.lax.scan(update, (params, optimizer.init(params)), keys)[0][0]


@jax.jit
def trained_at_own_points(params, rate, key, pairs):
    """2,000 updates by own points on whole trajectories, a fifth of the batch, as `update` does."""
    recipe = SimpleNamespace(sigmas=SIGMAS, steps=STEPS, batch_size=64, num_points=13, layout=None)
    knobs = SimpleNamespace(
        own_steps=STEPS, own_share=0.2, guidance_scale=1.0, negative_fraction=0.1
    )

    def update(carry, key):
        params, moments, points = carry
        keys = jax.random.split(key, 4)
        i = jax.random.randint(keys[0], (64,), 0, STEPS)
        j, others = jax.random.randint(keys[1], (2, 64), 0, PATHS)
        text = jnp.zeros((64, 1, 1)), jnp.zeros(64, jnp.int32)
        fresh = samples.Fresh(pairs[0][0, others], jnp.zeros(64, jnp.int32), *text, *text)
        fresh = samples.with_points(recipe, fresh)
        t = jnp.asarray(SIGMAS)[i]
        batch = samples.Batch(pairs[0][i, j], pairs[1][i, j], t, t, *text)
        points = samples.move(
            points, fresh, recipe, lambda x, t, *text: small_network(params, x, t), knobs,
        )  # fmt: skip
        batch = samples.own_points(
            batch, points, fresh, recipe, lambda x, t, *text: mixture(x, t), knobs, keys[2]
        )

        def loss(params):
            u = small_network(params, batch.x, batch.t_from)
            return objectives.velocity_matching(u, batch.u_teacher)

        changes, moments = optimizer.update(jax.grad(loss)(params), moments)
        params = jax.tree.map(lambda p, c: p + rate * c, params, changes)
        return (params, moments, points), None

    optimizer = optax.adam(1.0)
    points = samples.with_points(recipe, samples.no_points(recipe, (1, 1, 1, 2), (1, 1)))
    start = params, optimizer.init(params), points
    return jax.lax.scan(update, start, jax.random.split(key, 2000))[0][0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_a_mixture_the_printed_form_grows_and_the_default_does_not(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    start = {
        "in": 0.7 * jax.random.normal(keys[0], (5, WIDTH)),
        "bias": 0.5 * jax.random.normal(keys[1], (WIDTH,)),
        "out": jax.random.normal(keys[2], (WIDTH, 2)) / WIDTH**0.5,
    }
    pairs, held_out = (jax.jit(trajectories)(jax.random.key(i)) for i in (1, 2))
    key = jax.random.key(3)
    fitted = trained(start, 1.0, 0.0, 1e-2, key, pairs, True)
    printed = trained(fitted, 0.0, 1.0, 3e-3, key, pairs, True)
    anchored = trained(fitted, 1.0, 1.0, 3e-3, key, pairs, False)
    default = trained_at_own_points(fitted, 3e-3, key, pairs)
    before = error(fitted, held_out)
    assert before < 0.1 * error(start, held_out)
    assert error(printed, held_out) > 1.25 * before
    assert error(anchored, held_out) < before
    assert error(default, held_out) < before
