"""Softmax attention by JAX's splash attention (TPU)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from kernels.dispatch import platform

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LANES = 128
# Tokens of a tile, multiples of LANES; chosen by compiling, not by timing.
BLOCK = 512


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
    interpret: bool = False,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`. `interpret`: on any platform, for tests.

    Raises: NotImplementedError off TPUs, for a dtype other than bfloat16 and float32, for a
    head_dim that is not a multiple of 128, and for a bias.
    """
    if platform() != "tpu" and not interpret:
        raise NotImplementedError(f"needs a TPU, this is {platform()}")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs bfloat16 or float32, got {q.dtype}")
    if q.shape[-1] % LANES:
        raise NotImplementedError(f"needs a head_dim that is a multiple of {LANES}")
    if bias is not None:
        raise NotImplementedError("takes no bias")
    tokens, keys = q.shape[1], k.shape[1]
    q = q * q.shape[-1] ** -0.5
    q, k, v = (_padded(x).swapaxes(1, 2) for x in (q, k, v))
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], interpret)
    segments = None
    if k.shape[2] != keys:  # padding is another segment, to which no query belongs
        segments = library.SegmentIds(
            q=jnp.zeros(q.shape[2], jnp.int32),
            kv=(jnp.arange(k.shape[2]) >= keys).astype(jnp.int32),
        )
    out = jax.vmap(lambda *args: kernel(*args, segment_ids=segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :tokens].astype(v.dtype)


def _kernel(heads: int, tokens: int, keys: int, interpret: bool):
    rows, columns = min(BLOCK, tokens), min(BLOCK, keys)
    sizes = library.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = library.MultiHeadMask([library.FullMask((tokens, keys))] * heads)
    # Its tables are constants of the program that is being traced: they are not kept.
    make = functools.partial(library.make_splash_mha_single_device, block_sizes=sizes)
    return make(mask, interpret=interpret)


def _padded(x: Float[Array, "batch tokens heads head_dim"]) -> Array:
    """To a multiple of BLOCK tokens, or of LANES where there are fewer."""
    multiple = BLOCK if x.shape[1] >= BLOCK else LANES
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
