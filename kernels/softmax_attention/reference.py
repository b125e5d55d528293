"""Softmax attention in plain JAX: the semantics every other implementation is tested against."""

import jax
from jaxtyping import Array, Float

from kernels.dispatch import einsum_float32


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`; supports every input."""
    logits = einsum_float32("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return einsum_float32("bhqk,bkhd->bqhd", weights, v).astype(v.dtype)
