"""Anytime distribution matching (paper, eq. 11 to 13), its weightings, and the velocity anchor."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from linvideo_jax.errors import UserError

Latents = Float[Array, "batch frames height width channels"]
Times = Float[Array, " batch"]


def _per_sample(values: Times) -> Float[Array, "batch 1 1 1 1"]:
    return values[:, None, None, None, None]


def score_difference(u: Latents, u_student: Latents, t: Times) -> Latents:
    """s_t - s^_t = -((1 - t) / t) (u - u^) of velocities at one point (paper, eq. 13); t > 0."""
    return -_per_sample((1.0 - t) / t) * (u - u_student)


def weigh(difference: Latents, t: Times, weighting: str, largest: float = 4.0) -> Latents:
    """Scales the score difference against its growth as t falls to 0.

    paper: as it is. clipped: the factor (1 - t) / t is held at `largest`.
    normalised: DMD's, each sample divided by its mean absolute value.
    """
    if weighting == "paper":
        return difference
    if weighting == "clipped":
        factor = (1.0 - t) / t
        return difference * _per_sample(jnp.minimum(1.0, largest / jnp.maximum(factor, 1e-6)))
    if weighting == "normalised":
        size = jnp.mean(jnp.abs(difference), axis=(1, 2, 3, 4), keepdims=True)
        return difference / jnp.maximum(size, 1e-6)
    raise UserError(f"transfer.weighting is {weighting!r}: choose paper, clipped or normalised.")


def anytime_distribution_matching(
    student: Callable[[Latents, Times], Latents],
    frozen_student: Callable[[Latents, Times], Latents],
    teacher: Callable[[Latents, Times], Latents],
    x: Latents,
    t_from: Times,
    t_to: Times,
    weighting: str,
) -> tuple[Float[Array, ""], Latents]:
    """A scalar whose gradient is ADM's (paper, eq. 11 to 13), and the student's u^(x, t_from).

    x^_t = x + (t_to - t_from) u^(x, t_from) is one student step; both velocities of the score
    difference are constants there, so the gradient flows through that u^ alone: `frozen_student`
    is the same function of constant parameters, which saves its backward pass. Where t_to is 0
    the score difference is not finite and the sample contributes nothing. The mean runs over the
    batch and the latent elements, which gives lambda its meaning.
    """
    u_here = student(x, t_from)
    x_to = x + _per_sample(t_to - t_from) * u_here
    point = jax.lax.stop_gradient(x_to)
    matched = t_to > 0.0
    t_safe = jnp.where(matched, t_to, 1.0)
    difference = score_difference(teacher(point, t_safe), frozen_student(point, t_safe), t_safe)
    direction = jax.lax.stop_gradient(weigh(difference, t_safe, weighting))
    return jnp.mean(jnp.where(_per_sample(matched), -direction * x_to, 0.0)), u_here


def velocity_anchor(u_student: Latents, u_teacher: Latents) -> Float[Array, ""]:
    """||u_t - u^(x_t, t)||^2, the mean over batch and latent elements (the ablation's MSE)."""
    return jnp.mean(jnp.square(u_student - u_teacher))
