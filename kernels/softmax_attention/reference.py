"""Softmax attention in plain JAX: the semantics every other implementation is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels.dispatch import einsum_float32

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`; supports every input."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = einsum_float32("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if bias is not None:
        logits = logits + bias
    # The sum divides the output, not the weights: one pass less over the largest array.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = einsum_float32("bhqk,bhkd->bhqd", weights.astype(v.dtype), v) / total
    return out.astype(v.dtype).swapaxes(1, 2)
