"""The mixed attention of training: a share r of one attention and 1 - r of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.custom_vjp
def mix(
    r: Float[Array, ""], softmax: Float[Array, "*shape"], linear: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """r softmax + (1 - r) linear in float32, in the dtype of both (LinVideo, eq. 8).

    dr = sum of dout (softmax - linear), from the two as they are: differentiating the sum itself
    would keep a float32 copy of each.
    """
    mixed = r * softmax.astype(jnp.float32) + (1 - r) * linear.astype(jnp.float32)
    return mixed.astype(softmax.dtype)


def _forward(r, softmax, linear):
    return mix(r, softmax, linear), (r, softmax, linear)


def _backward(saved, dout):
    r, softmax, linear = saved
    wide = dout.astype(jnp.float32)
    difference = softmax.astype(jnp.float32) - linear.astype(jnp.float32)
    dr = jnp.sum(wide * difference).astype(r.dtype)
    return dr, (r * wide).astype(softmax.dtype), ((1 - r) * wide).astype(linear.dtype)


mix.defvjp(_forward, _backward)
