"""Softmax attention by tokamax's Mosaic kernel (NVIDIA Hopper, 16-bit inputs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels.dispatch import platform
from kernels.gpu import target

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`.

    Raises: NotImplementedError off Hopper, for 32-bit inputs, for a head_dim other than 64 and
    128, for a bias, without the package tokamax, and where tokamax itself refuses.
    """
    check(q, bias)
    import tokamax

    return tokamax.dot_product_attention(q, k, v, implementation="mosaic")


def check(
    q: Float[Array, "batch tokens heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> None:
    """Raises: as `softmax_attention`, but for tokamax's own refusals."""
    if platform() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {platform()}")
    gpu = target()
    if gpu.capability != 9.0:
        raise NotImplementedError(f"needs a Hopper GPU, this is {gpu.kind}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] not in (64, 128):
        raise NotImplementedError(f"needs head_dim 64 or 128, got {q.shape[-1]}")
    if bias is not None:
        raise NotImplementedError("is not used with a bias, whose gradient it would compute")
    try:
        import tokamax  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(
            f"needs the package tokamax, which needs Python 3.12 or newer: {error}"
        ) from error
