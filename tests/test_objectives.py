"""Anytime distribution matching against the paper's formula, by hand on linear velocities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.errors import UserError
from linvideo_jax.flow import rectified
from linvideo_jax.transfer import objectives

SHAPE = (3, 1, 2, 2, 2)
T_FROM = jnp.array([0.9, 0.5, 0.3])
T_TO = jnp.array([0.6, 0.25, 0.1])
THETA, TEACHER = 0.7, 1.3


def velocity(theta):
    """u(x, t) = theta x + t."""
    return lambda x, t: theta * x + t[:, None, None, None, None]


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)


def adm(theta, x, t_to=T_TO, weighting="paper", frozen=None):
    frozen = theta if frozen is None else frozen
    return objectives.anytime_distribution_matching(
        velocity(theta), velocity(frozen), velocity(TEACHER), x, T_FROM, t_to, weighting
    )


def by_hand(x, weight):
    """-(s - s^) dx^/dtheta, eq. 11 to 13: s - s^ = -((1 - t) / t)(u - u^) and dx^/dtheta = dt x."""
    x, t_from, t_to = (np.asarray(array, np.float64) for array in (x, T_FROM, T_TO))

    def over(values):
        return values[:, None, None, None, None]

    step = over(t_to - t_from)
    point = x + step * (THETA * x + over(t_from))
    difference = -weight(over(t_to), (TEACHER - THETA) * point)
    return np.mean(-difference * step * x)


def paper(t, difference):
    return (1 - t) / t * difference


def clipped(t, difference):
    return np.minimum((1 - t) / t, 4.0) * difference


@pytest.mark.parametrize("weight", [paper, clipped])
def test_gradient_is_the_papers(x, weight):
    gradient = jax.grad(lambda theta: adm(theta, x, weighting=weight.__name__)[0])(THETA)
    np.testing.assert_allclose(gradient, by_hand(x, weight), rtol=1e-4)


def test_both_velocities_of_the_score_difference_are_constants(x):
    def through_the_constants(theta):
        return objectives.anytime_distribution_matching(
            velocity(THETA), velocity(theta), velocity(theta), x, T_FROM, T_TO, "paper"
        )[0]

    assert jax.grad(through_the_constants)(0.2) == 0
    # A student that already is the teacher has nothing to learn.
    assert jax.grad(lambda theta: adm(theta, x, frozen=TEACHER)[0])(TEACHER) == 0


def test_descent_moves_the_students_point_by_the_velocity_error(x):
    """x^ moves by -((1 - t) / t)(u - u^): where the teacher's velocity is larger, it falls."""

    def loss(shift):
        def student(x, t):
            return THETA * x + shift

        return objectives.anytime_distribution_matching(
            student, lambda x, t: 0 * x, lambda x, t: 0 * x + 1.0, x, T_FROM, T_TO, "paper"
        )[0]

    gradient = jax.grad(loss)(jnp.zeros(SHAPE)) * x.size
    t = np.asarray(T_TO)[:, None, None, None, None]
    step = np.asarray(T_TO - T_FROM)[:, None, None, None, None]
    np.testing.assert_allclose(gradient, np.broadcast_to((1 - t) / t * step, SHAPE), rtol=1e-4)


@pytest.mark.parametrize("weighting", ["paper", "clipped"])
def test_a_step_to_zero_contributes_nothing(x, weighting):
    t_to = T_TO.at[1].set(0.0)

    def loss(theta, x):
        return adm(theta, x, t_to, weighting)[0]

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(THETA, x)
    assert np.isfinite(value) and np.isfinite(gradient[0])
    np.testing.assert_array_equal(gradient[1][1], 0)
    moved = x.at[1].multiply(3.0)  # what is there does not matter
    np.testing.assert_allclose(loss(THETA, moved), value, rtol=1e-6)
    everywhere = adm(THETA, x, jnp.zeros(3), weighting)[0]
    assert everywhere == 0


def test_the_students_velocity_is_returned_for_the_anchor(x):
    u = adm(THETA, x)[1]
    np.testing.assert_allclose(u, velocity(THETA)(x, T_FROM), rtol=1e-6)
    gradient = jax.grad(lambda theta: objectives.velocity_matching(adm(theta, x)[1], 0 * x))(THETA)
    np.testing.assert_allclose(gradient, np.mean(2 * np.asarray(u) * np.asarray(x)), rtol=1e-4)


def test_anchor_is_a_mean_square():
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.0, 6.0])
    np.testing.assert_allclose(objectives.velocity_matching(a, b), (0 + 4 + 9) / 3)


def test_score_difference_is_that_of_the_scores(x):
    """log p(x_t | x_0) is normal with mean (1 - t) x_0 and deviation t."""
    t = T_TO.reshape(-1, 1, 1, 1, 1)

    def score(u):
        return -(x - (1 - t) * rectified.x0_from_velocity(x, u, T_TO)) / t**2

    u, u_student = velocity(TEACHER)(x, T_TO), velocity(THETA)(x, T_TO)
    found = objectives.score_difference(u, u_student, T_TO)
    np.testing.assert_allclose(found, score(u) - score(u_student), rtol=1e-4, atol=1e-5)


def test_weighting_bounds():
    t = jnp.array([1e-3, 0.1, 0.5])
    difference = -((1 - t) / t)[:, None, None, None, None] * jnp.ones(SHAPE)
    clipped = objectives.weigh(difference, t, "clipped")
    np.testing.assert_allclose(clipped[:, 0, 0, 0, 0], [-4, -4, -1], rtol=1e-5)
    np.testing.assert_array_equal(objectives.weigh(difference, t, "paper"), difference)
    with pytest.raises(UserError, match="choose paper or clipped"):
        objectives.weigh(difference, t, "none")
