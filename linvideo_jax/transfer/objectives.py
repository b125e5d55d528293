"""What brings the student to the teacher: the paper's objective, its ablations, and relatives.

All velocities are functions (x, t) -> u of one branch, conditional or negative. Every objective is
a mean over batch and latent elements: that fixed reduction gives lambda (eq. 14) its meaning.

| objective | what | forwards of an update beside the student's own with its gradient |
|---|---|---|
| adm | `anytime_distribution_matching` with the student's own score | 1 student, 1 teacher |
| adm_score | the same, with a score network's | 1 score, 1 teacher, and the critic's updates |
| mse | `velocity_matching` at the stored pairs | none |
| own_points | `velocity_matching` at the student's own points | 2 student, 1 teacher, of the \
samples that keep a point |
| dmd | `distribution_matching_at_zero` | 1 score, 1 teacher, the critic's updates; the gradient \
runs through a rollout |

A critic's update is a student's rollout and a gradient of the score network. `Recipe.forwards` is
their number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from linvideo_jax.errors import UserError
from linvideo_jax.flow import rectified

Latents = Float[Array, "batch frames height width channels"]
Times = Float[Array, " batch"]
Velocity = Callable[[Latents, Times], Latents]


def _per_sample(values: Times) -> Float[Array, "batch 1 1 1 1"]:
    return values[:, None, None, None, None]


def score_difference(u: Latents, u_student: Latents, t: Times) -> Latents:
    """s_t - s^_t = -((1 - t) / t) (u - u^) of velocities at one point (paper, eq. 13); t > 0."""
    return -_per_sample((1.0 - t) / t) * (u - u_student)


def weigh(difference: Latents, t: Times, weighting: str, largest: float = 4.0) -> Latents:
    """Scales the score difference against its growth as t falls to 0.

    paper: as it is. clipped: the factor (1 - t) / t is held at `largest`.
    """
    if weighting == "paper":
        return difference
    if weighting == "clipped":
        factor = (1.0 - t) / t
        return difference * _per_sample(jnp.minimum(1.0, largest / jnp.maximum(factor, 1e-6)))
    raise UserError(f"transfer.weighting is {weighting!r}: choose paper or clipped.")


def _matching(
    x_t: Latents, t: Times, score: Velocity, teacher: Velocity, weighting: str
) -> Float[Array, ""]:
    """A scalar whose gradient is E[-(s_t - s^_t) d x_t / d theta] (paper, eq. 11).

    Both velocities of the score difference are constants. Where t is 0 it is not finite, and the
    sample contributes nothing.
    """
    point = jax.lax.stop_gradient(x_t)
    matched = t > 0.0
    t_safe = jnp.where(matched, t, 1.0)
    difference = score_difference(teacher(point, t_safe), score(point, t_safe), t_safe)
    direction = jax.lax.stop_gradient(weigh(difference, t_safe, weighting))
    return jnp.mean(jnp.where(_per_sample(matched), -direction * x_t, 0.0))


def anytime_distribution_matching(
    student: Velocity,
    score: Velocity,
    teacher: Velocity,
    x: Latents,
    t_from: Times,
    t_to: Times,
    weighting: str,
) -> tuple[Float[Array, ""], Latents]:
    """A scalar whose gradient is ADM's (paper, eq. 11 to 13), and the student's u^(x, t_from).

    x^_t = x + (t_to - t_from) u^(x, t_from) is one student step, and the gradient flows through
    that u^ alone. `score` gives the velocity that stands for the score of the student's
    distribution: in ADM the student itself, with constant parameters, which saves its backward
    pass; in the ablation marked with a dagger a network trained by `flow_matching`.
    """
    u_here = student(x, t_from)
    x_to = x + _per_sample(t_to - t_from) * u_here
    return _matching(x_to, t_to, score, teacher, weighting), u_here


def distribution_matching_at_zero(
    x_0: Latents, noise: Latents, t: Times, score: Velocity, teacher: Velocity, weighting: str
) -> Float[Array, ""]:
    """DMD, the ablation: a scalar whose gradient is that of KL(q_t || p_t) for noised samples.

    x_0: the student's samples with their gradient (`rollout`); they are matched through
    x_t = (1 - t) x_0 + t noise, since the scores at t = 0 do not exist. `score`: the velocity of
    the noised student samples (`flow_matching`).
    """
    x_t = rectified.interpolate(x_0, noise, t)
    return _matching(x_t, t, score, teacher, weighting)


def rollout(student: Velocity, x: Latents, t: Times, steps: int) -> tuple[Latents, Latents]:
    """The student's sample at t = 0 from x at t, by Euler steps of equal length, and u^(x, t).

    Gradients run through all steps; the backward pass recomputes each.
    """

    def step(carry, index):
        x, time = carry
        u = student(x, time)
        following = t * (1.0 - (index + 1.0) / steps)
        return (x + _per_sample(following - time) * u, following), u

    (x_0, _), velocities = jax.lax.scan(jax.checkpoint(step), (x, t), jnp.arange(steps))
    return x_0, velocities[0]


def flow_matching(score: Velocity, x_0: Latents, noise: Latents, t: Times) -> Float[Array, ""]:
    """The score network's loss: ||u(x_t, t) - (noise - x_0)||^2 on constant samples x_0.

    Its minimum is the velocity of the noised samples, which gives their score.
    """
    x_0 = jax.lax.stop_gradient(x_0)
    x_t = rectified.interpolate(x_0, noise, t)
    return velocity_matching(score(x_t, t), noise - x_0)


def velocity_matching(u_student: Latents, u_teacher: Latents) -> Float[Array, ""]:
    """||u_t - u^(x_t, t)||^2, the mean over batch and latent elements; u_t is a constant.

    On the stored pairs it is the ablation's MSE, and ADM's anchor; on points that the student
    reached itself (`samples.own_points`) it is the direct gradient there.
    """
    return jnp.mean(jnp.square(u_student - jax.lax.stop_gradient(u_teacher)))
