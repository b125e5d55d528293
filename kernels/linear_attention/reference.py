"""Hedgehog linear attention in plain JAX: the semantics every kernel is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dispatch import einsum_float32

if TYPE_CHECKING:
    from kernels.linear_attention.interface import FeatureMap

# Only guards a key set without any mass; the denominator is about keys / features.
EPSILON = 1e-12


def hedgehog(
    x: Float[Array, "batch tokens heads head_dim"],
    weight: Float[Array, "heads head_dim features"],
) -> Float[Array, "batch tokens heads double_features"]:
    """[softmax(x W), softmax(-x W)], in float32, rounded to x's dtype."""
    y = einsum_float32("bthd,hdf->bthf", x, weight.astype(x.dtype))
    features = jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)
    return features.astype(x.dtype)


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.linear_attention`; supports every input."""
    phi_q = hedgehog(q, feature_map.q)
    phi_k = hedgehog(k, feature_map.k)
    state = einsum_float32("bkhf,bkhd->bhfd", phi_k, v).astype(v.dtype)
    mass = jnp.sum(phi_k, axis=1, dtype=jnp.float32)
    numerator = einsum_float32("bqhf,bhfd->bqhd", phi_q, state)
    denominator = jnp.einsum("bqhf,bhf->bqh", phi_q.astype(jnp.float32), mass)
    return (numerator / (denominator[..., None] + EPSILON)).astype(v.dtype)
