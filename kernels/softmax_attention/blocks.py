"""Softmax attention in blocks of keys that meet one after the other, as in ring attention.

A block gives its output and the logarithm of its softmax's denominator; `merge` makes of two of
them that of both sets of keys. The backward pass of a block needs the logarithm over all keys, not
over its own. Plain JAX; queries go a chunk at a time, so that no array holds all logits.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from kernels.dispatch import einsum_float32

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

MASKED = -1e30  # finite: a block without any key still has a maximum
LOGITS_AT_ONCE = 1 << 27  # numbers, 0.5 GB in float32


class Block(NamedTuple):
    """Attention of all queries to some of the keys, float32."""

    out: Float[Array, "batch tokens heads head_dim"]
    log_total: Float[Array, "batch heads tokens"]
    """log sum exp(logits) over these keys."""


def attend(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    num_keys: Int[Array, ""] | None = None,
) -> Block:
    """Attention to the first `num_keys` keys (None: all); with none the block has no weight."""

    def chunk(q):
        logits = _logits(q, k, num_keys)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1)
        out = einsum_float32("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
        return Block(out / total.swapaxes(1, 2)[..., None], largest[..., 0] + jnp.log(total))

    size, count = _chunks(q, k)
    if count == 1:
        return chunk(q)
    blocks = jax.lax.map(chunk, split(q, size, count, axis=1))
    return Block(*(join(x, q.shape[1], axis) for x, axis in zip(blocks, (1, 2), strict=True)))


def merge(first: Block, second: Block) -> Block:
    """The block of the keys of both."""
    log_total = jnp.logaddexp(first.log_total, second.log_total)
    weights = (jnp.exp(block.log_total - log_total) for block in (first, second))
    first_part, second_part = (
        weight.swapaxes(1, 2)[..., None] * block.out
        for weight, block in zip(weights, (first, second), strict=True)
    )
    return Block(first_part + second_part, log_total)


def gradients(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    whole: Block,
    dout: Float[Array, "batch tokens heads head_dim"],
    num_keys: Int[Array, ""] | None = None,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), float32: what these keys add to the gradient of attention to all keys.

    whole: the block of all keys; dout: the gradient of its output.
    """
    dout = dout.astype(q.dtype)
    # sum_k p dp, of which every key's logit takes its share (FlashAttention-2, section 3.1).
    delta = jnp.sum(dout.astype(jnp.float32) * whole.out, axis=-1).swapaxes(1, 2)

    def chunk(carry, inputs):
        q, dout, log_total, delta = inputs
        weights = jnp.exp(_logits(q, k, num_keys) - log_total[..., None])
        dv = einsum_float32("bhqk,bqhd->bkhd", weights.astype(v.dtype), dout)
        dlogits = weights * (einsum_float32("bqhd,bkhd->bhqk", dout, v) - delta[..., None])
        dlogits = (dlogits * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = einsum_float32("bhqk,bqhd->bkhd", dlogits, q)
        return (carry[0] + dk, carry[1] + dv), einsum_float32("bhqk,bkhd->bqhd", dlogits, k)

    zero = jnp.zeros(k.shape, jnp.float32)
    size, count = _chunks(q, k)
    if count == 1:
        (dk, dv), dq = chunk((zero, zero), (q, dout, whole.log_total, delta))
        return dq, dk, dv
    parts = functools.partial(split, size=size, count=count)
    # A padded query has an infinite total, so that its weights are zero.
    log_total = parts(whole.log_total, axis=2, fill=jnp.inf)
    inputs = parts(q, axis=1), parts(dout, axis=1), log_total, parts(delta, axis=2)
    (dk, dv), dq = jax.lax.scan(chunk, (zero, zero), inputs)
    return join(dq, q.shape[1], 1), dk, dv


def _logits(q, k, num_keys):
    logits = einsum_float32("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    if num_keys is None:
        return logits
    return jnp.where(jnp.arange(k.shape[1]) < num_keys, logits, MASKED)


def _chunks(q, k) -> tuple[int, int]:
    """(queries of a chunk, number of chunks), of sizes as equal as they can be."""
    batch, tokens, heads, _ = q.shape
    count = -(-batch * heads * tokens * k.shape[1] // LOGITS_AT_ONCE)
    size = -(-tokens // min(count, tokens))
    return size, -(-tokens // size)


def split(x: Array, size: int, count: int, axis: int, fill: float = 0) -> Array:
    """`count` chunks of `size` along `axis`, on a new first axis; `fill` behind the end."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size * count - x.shape[axis])
    x = jnp.pad(x, pads, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def join(x: Array, length: int, axis: int) -> Array:
    """The chunks of `split` in one again, without what was filled."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
