"""Linear attention in plain JAX: the semantics every kernel is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels.dispatch import einsum_float32
from kernels.linear_attention.feature_maps import FEATURES
from kernels.linear_attention.types import FeatureMap, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# Added to the denominator, which is about keys / features. It is zero without a key, or where
# every product of features underflows: the output is zero there, and gradients are finite.
EPSILON = 1e-12
# Least divisor of a sum of features, so that one without mass has a mean of zero.
TINY = float(jnp.finfo(jnp.float32).tiny)


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.linear_attention`; supports every input."""
    return apply_state(q, linear_attention_state(k, v, feature_map, key_lengths), feature_map)


def linear_attention_state(
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
) -> State:
    """See `interface.linear_attention_state`; supports every input."""
    k, v = _wide(k), _wide(v)
    phi = FEATURES[feature_map.name].of(k, feature_map.k)
    if key_lengths is not None:
        valid = (jnp.arange(k.shape[1]) < key_lengths[:, None])[..., None, None]
        phi, v = jnp.where(valid, phi, 0), jnp.where(valid, v, 0)
    return state_of_features(phi, v)


def apply_state(
    q: Float[Array, "batch tokens heads head_dim"], state: State, feature_map: FeatureMap
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.apply_state`; supports every input."""
    phi = FEATURES[feature_map.name].of(_wide(q), feature_map.q)
    return apply_to_features(phi, state).astype(q.dtype)


def state_of_features(
    phi: Float[Array, "batch keys heads features"], v: Float[Array, "batch keys heads head_dim"]
) -> State:
    """The state of keys whose features are phi, whatever map they come from."""
    mass = jnp.sum(phi, axis=1, dtype=jnp.float32)
    return State(einsum_float32("bkhf,bkhd->bhfd", phi, v), mass)


def apply_to_features(
    phi: Float[Array, "batch tokens heads features"], state: State
) -> Float[Array, "batch tokens heads head_dim"]:
    """phi state.kv / (phi state.mass), float32, of queries whose features are phi."""
    numerator = einsum_float32("bqhf,bhfd->bqhd", phi, state.kv.astype(phi.dtype))
    denominator = jnp.einsum("bqhf,bhf->bqh", phi.astype(jnp.float32), state.mass)
    return numerator / (denominator[..., None] + EPSILON)


def _wide(x: Array) -> Array:
    """float16 as float32: a sum over tokens, or its gradient, leaves the range of float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
