"""The losses of selective transfer against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.transfer import scores

R = jnp.array([0.9, 0.6, 0.4, 0.1, 0.0, 1.0])


def test_count_of_linear_layers_is_of_rounded_scores():
    assert scores.linear_count(R) == 3
    assert scores.linear_count(jnp.ones(5)) == 0 and scores.linear_count(jnp.zeros(5)) == 5


@pytest.mark.parametrize("target", [0, 2, 3, 6])
def test_constraint_and_its_straight_through_gradient(target):
    value, gradient = jax.value_and_grad(scores.constraint)(R, target)
    assert value == (3 - target) ** 2
    # d/dr (count - target)^2 with d count / d r = -1 for every layer, wherever it stands.
    np.testing.assert_allclose(gradient, np.full(6, -2.0 * (3 - target)))


@pytest.mark.parametrize("alpha", [2.0, 5.0, 20.0])
def test_regulariser_and_its_gradient(alpha):
    value, gradient = jax.value_and_grad(scores.regulariser)(R, alpha)
    x = 2 * np.asarray(R, np.float64) - 1
    np.testing.assert_allclose(value, np.sum(1 - np.abs(x) ** alpha), rtol=1e-5)
    slope = -2 * alpha * np.sign(x) * np.abs(x) ** (alpha - 1)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-12)


def test_regulariser_is_zero_only_at_the_ends_and_finite_in_the_middle():
    assert scores.regulariser(jnp.array([0.0, 1.0, 1.0]), 2.0) == 0
    assert scores.regulariser(jnp.array([0.5, 0.5]), 2.0) == 2
    for alpha in (2.0, 20.0):
        gradient = jax.grad(scores.regulariser)(jnp.array([0.5]), alpha)
        np.testing.assert_array_equal(gradient, [0.0])


def test_descent_on_the_regulariser_goes_to_the_nearer_end():
    gradient = jax.grad(scores.regulariser)(jnp.array([0.49, 0.51]), 2.0)
    assert gradient[0] > 0 > gradient[1]


def test_alpha_falls_linearly_and_stays():
    alphas = [float(scores.annealed_alpha(p)) for p in (-0.1, 0.0, 0.5, 1.0, 1.5)]
    np.testing.assert_allclose(alphas, [20, 20, 11, 2, 2])
    alphas = [float(scores.annealed_alpha(p, 10.0, 4.0, 0.6)) for p in (0.0, 0.3, 0.6, 0.9)]
    np.testing.assert_allclose(alphas, [10, 7, 4, 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("r", "target", "chosen", "corrected"),
    [
        ([0.9, 0.1, 0.8, 0.0], 2, (1, 3), ()),
        ([0.9, 0.1, 0.8, 0.0], 1, (3,), (1,)),  # one too many fell below a half
        ([0.9, 0.1, 0.8, 0.6], 3, (1, 2, 3), (2, 3)),  # two too few
        ([0.5, 0.5, 0.5], 1, (0,), (1, 2)),  # a half rounds to linear; the first of equals
        ([0.9, 0.1], 0, (), (1,)),
        ([0.9, 0.1], 2, (0, 1), (0,)),
    ],
)
def test_choice_of_layers_and_its_corrections(r, target, chosen, corrected):
    assert scores.choose_linear_layers(np.array(r), target) == (chosen, corrected)
    rounded = {i for i in range(len(r)) if jnp.round(r[i]) == 0}
    assert rounded.symmetric_difference(chosen) == set(corrected)
    assert scores.linear_count(jnp.array(r)) == len(rounded)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("rate", "lambda_", "settles"), [(0.3, 0.03, True), (0.3, 0.1, True), (0.03, 0.03, False)]
)
def test_descent_in_a_toy_selection(rate, lambda_, settles, seed):
    """docs/method.md: 12 layers whose damage is cost (1 - r)^2, noisy gradients, 6 to replace."""
    rng = np.random.default_rng(seed)
    costs = jnp.asarray(rng.permutation(np.linspace(0.001, 0.005, 12)))

    def loss(r, step, noise):
        damage = jnp.sum(costs * (1 + noise) * (1 - r) ** 2)
        alpha = scores.annealed_alpha(step / 1800, 20.0, 2.0, 0.6)
        return damage + lambda_ * (scores.constraint(r, 6) + scores.regulariser(r, alpha))

    def descend(r, inputs):
        return jnp.clip(r - rate * jax.grad(loss)(r, *inputs), 0, 1), None

    noise = jax.random.normal(jax.random.key(seed), (1800, 12))
    r = np.asarray(jax.lax.scan(descend, jnp.full(12, 0.9), (jnp.arange(1800.0), noise))[0])
    distance = np.minimum(r, 1 - r).max()
    if not settles:
        assert distance > 0.4
        return
    assert distance < 0.05 and scores.linear_count(jnp.asarray(r)) == 6
    chosen, corrections = scores.choose_linear_layers(r, 6)
    assert corrections == ()
    assert set(chosen) == set(np.argsort(costs)[:6].tolist())
