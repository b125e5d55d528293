"""Softmax attention as a function of arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from kernels.dispatch import dispatch
from kernels.softmax_attention import (
    chunked,
    cudnn,
    hopper,
    reference,
    splash,
    tokamax_mosaic,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LIBRARIES = {
    "hopper": hopper.softmax_attention,
    "tokamax": tokamax_mosaic.softmax_attention,
    "cudnn": cudnn.softmax_attention,
    "splash": splash.softmax_attention,
}
IMPLEMENTATIONS = {
    **LIBRARIES,
    "chunked": chunked.softmax_attention,
    "reference": reference.softmax_attention,
}
# From this size of all logits on, `chunked` instead of `reference`: it is slower, and saves them.
LARGE = 2**30
# Names an implementation, or several with commas, where the caller does not.
VARIABLE = "SOFTMAX_ATTENTION"


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
    `implementation`: "hopper" (tokamax's values, cuDNN's gradients), "tokamax", "cudnn", "splash",
    "chunked", "reference", several in order of preference, or None for what the environment
    variable SOFTMAX_ATTENTION says, else for the first library that supports the inputs, else plain
    JAX: "chunked" where the logits would take a GiB or more, "reference" below. Which one serves,
    and why not the others, is logged once.

    Raises: NotImplementedError with the reason if no named implementation supports the inputs.
    """
    if bias is not None:
        bias = jax.lax.stop_gradient(bias)
    if implementation is None and os.environ.get(VARIABLE):
        implementation = os.environ[VARIABLE].split(",")
    if implementation is None:
        plain = "chunked" if chunked.logits_bytes(q, k) >= LARGE else "reference"
        implementation = (*LIBRARIES, plain)
    return dispatch(IMPLEMENTATIONS, implementation, q, k, v, bias)
