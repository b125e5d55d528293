"""Softmax attention by cuDNN's flash attention (NVIDIA GPUs, 16-bit inputs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

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
    check(q, bias)
    tokens, keys = q.shape[1], k.shape[1]
    if tokens % 2 == keys % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    # Its backward pass takes even lengths alone; one more key is masked, one more query cut off.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=jnp.full(len(q), tokens),
        key_value_seq_lengths=jnp.full(len(k), keys),
        implementation="cudnn",
    )
    return out[:, :tokens]


def check(
    q: Float[Array, "batch tokens heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> None:
    """Raises: as `softmax_attention`."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {jax.default_backend()}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise NotImplementedError(f"needs head_dim in 8, 16 .. 128, got {q.shape[-1]}")
    if bias is not None:
        # Its backward pass would sum a gradient of the bias that nobody asks for.
        raise NotImplementedError("takes no bias")
