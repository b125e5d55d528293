"""Softmax attention in plain JAX, some queries at a time: memory for a part of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from kernels.softmax_attention import blocks, reference

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Of the logits that are in memory at once, in bytes of float32.
CHUNK_BYTES = 2**28


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
    chunk: int | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`; supports every input.

    Queries go in chunks, one after the other; the backward pass computes their weights again.
    `chunk`: queries of one; None for as many as CHUNK_BYTES allow.
    """
    batch, tokens, heads, _ = q.shape
    chunk = chunk or max(1, CHUNK_BYTES // (4 * batch * heads * k.shape[1]))
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)
    chunked_bias = bias is not None and bias.shape[2] > 1
    q_chunks = blocks.split(q, chunk, count, axis=1)
    bias_chunks = blocks.split(bias, chunk, count, axis=2) if chunked_bias else None

    @jax.checkpoint
    def attend(inputs):
        q, part = inputs
        return reference.softmax_attention(q, k, v, part if chunked_bias else bias)

    return blocks.join(jax.lax.map(attend, (q_chunks, bias_chunks)), tokens, axis=1)


def logits_bytes(q: Array, k: Array) -> int:
    """Of all logits in float32, which `reference` has in memory at once."""
    return 4 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
