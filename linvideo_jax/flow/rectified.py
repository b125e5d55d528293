"""Rectified flow: x_t = (1 - t) x_0 + t x_1, t in [0, 1], 1 is noise; the velocity is x_1 - x_0."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def _over_samples(t: Float[Array, "*batch"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`t`, a scalar or one value a sample, shaped to broadcast against `x`."""
    t = jnp.asarray(t, x.dtype)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(
    x0: Float[Array, "..."], noise: Float[Array, "..."], t: Float[Array, "*batch"]
) -> Float[Array, "..."]:
    """The point (1 - t) x_0 + t x_1 on the straight path from data to noise."""
    t = _over_samples(t, x0)
    return (1 - t) * x0 + t * noise


def x0_from_velocity(
    x: Float[Array, "..."], velocity: Float[Array, "..."], t: Float[Array, "*batch"]
) -> Float[Array, "..."]:
    """The data that a velocity at x_t points to: x_0 = x_t - t u."""
    return x - _over_samples(t, x) * velocity


def guided(
    conditional: Float[Array, "..."], unconditional: Float[Array, "..."], scale: float
) -> Float[Array, "..."]:
    """Classifier-free guidance, Wan's convention: uncond + scale (cond - uncond), so 1 is none."""
    return unconditional + scale * (conditional - unconditional)


def shift_time(t, shift: float):
    """Wan's flow shift of a time or sigma in [0, 1]: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)
