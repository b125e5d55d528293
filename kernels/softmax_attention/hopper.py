"""Softmax attention on NVIDIA Hopper: values by tokamax, and by cuDNN where gradients are wanted.

On an H100 tokamax's forward pass is the faster one (up to 6%), and cuDNN's forward and backward
passes together are (up to 10%): docs/kernels.md has the figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from kernels.softmax_attention import cudnn, tokamax_mosaic

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`. Raises: NotImplementedError where one of the two does."""
    tokamax_mosaic.check(q, bias)
    cudnn.check(q, bias)
    return _attention(q, k, v)


@jax.custom_vjp
def _attention(q, k, v):
    return tokamax_mosaic.softmax_attention(q, k, v, None)


def _forward(q, k, v):
    return jax.vjp(lambda *args: cudnn.softmax_attention(*args, None), q, k, v)


def _backward(pull, gradient):
    return pull(gradient)


_attention.defvjp(_forward, _backward)
