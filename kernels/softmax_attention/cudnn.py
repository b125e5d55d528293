"""Softmax attention by cuDNN's flash attention (NVIDIA GPUs, 16-bit inputs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels.dispatch import platform

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`.

    Raises: NotImplementedError off NVIDIA GPUs, for 32-bit inputs, for a head_dim that is not a
    multiple of 8 up to 128, and for a bias.
    """
    if platform() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {platform()}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise NotImplementedError(f"needs head_dim in 8, 16 .. 128, got {q.shape[-1]}")
    if bias is not None:
        # Its backward pass would sum a gradient of the bias that nobody asks for.
        raise NotImplementedError("takes no bias")
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
