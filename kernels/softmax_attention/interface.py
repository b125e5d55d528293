"""Softmax attention as a function of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from kernels.dispatch import dispatch
from kernels.softmax_attention import chunks, cudnn, reference

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IMPLEMENTATIONS = {
    "cudnn": cudnn.softmax_attention,
    "chunks": chunks.softmax_attention,
    "reference": reference.softmax_attention,
}


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    *,
    bias: Float[Array, "#batch #heads #tokens keys"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim) + bias) v, not causal; the softmax is in float32.

    q, k, v share one dtype, which is the output's. `bias` is a constant: it gets no gradient.
    `implementation`: "cudnn", "chunks", "reference", several in order of preference, or None for
    the first that supports the inputs.

    Raises: NotImplementedError with the reason if no named implementation supports the inputs.
    """
    if bias is not None:
        bias = jax.lax.stop_gradient(bias)
    return dispatch(IMPLEMENTATIONS, implementation, q, k, v, bias)
