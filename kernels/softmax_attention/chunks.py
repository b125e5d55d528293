"""Softmax attention in plain JAX whose memory grows with the tokens, not with their square.

What serves long sequences where no kernel does: queries go a chunk at a time (`blocks.py`), and
the backward pass makes the logits again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from kernels.softmax_attention import blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`.

    Raises: NotImplementedError for a bias, and where all logits fit at once.
    """
    batch, tokens, heads, _ = q.shape
    logits = batch * heads * tokens * k.shape[1]
    if logits <= blocks.LOGITS_AT_ONCE:
        raise NotImplementedError(f"is for more than {blocks.LOGITS_AT_ONCE} logits, got {logits}")
    if bias is not None:
        raise NotImplementedError("takes no bias")
    return _attention(q, k, v)


@jax.custom_vjp
def _attention(q, k, v):
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    block = blocks.attend(q, k, v)
    return block.out.astype(q.dtype), (q, k, v, block)


def _backward(saved, dout):
    q, k, v, whole = saved
    changes = blocks.gradients(q, k, v, whole, dout)
    return tuple(change.astype(x.dtype) for change, x in zip(changes, (q, k, v), strict=True))


_attention.defvjp(_forward, _backward)
