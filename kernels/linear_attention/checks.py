"""Inputs that no implementation can make sense of: ValueError with the shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels.linear_attention.feature_maps import FEATURES
from kernels.linear_attention.types import FeatureMap, State

if TYPE_CHECKING:
    from jaxtyping import Array

DTYPES = ("bfloat16", "float16", "float32")


def queries(q: Array, weight: Array) -> None:
    """q is `[batch, tokens, heads, head_dim]`, weight `[heads, head_dim, features]`."""
    _tokens("q", q, weight)


def keys_and_values(k: Array, v: Array, weight: Array, key_lengths: Array | None) -> None:
    """k and v are alike, `[batch, keys, heads, head_dim]`; key_lengths is `[batch]`, integer."""
    _tokens("k", k, weight)
    if (v.shape, v.dtype) != (k.shape, k.dtype):
        raise ValueError(f"k is {_text(k)} and v {_text(v)}: need the same shape and dtype")
    if key_lengths is None:
        return
    if key_lengths.shape != k.shape[:1] or not jnp.issubdtype(key_lengths.dtype, jnp.integer):
        raise ValueError(
            f"key_lengths is {_text(key_lengths)}: needs integers [{k.shape[0]}], one a batch entry"
        )


def queries_and_keys(q: Array, k: Array) -> None:
    """q and k agree in everything but their number of tokens."""
    if (q.shape[0], q.shape[2:], q.dtype) != (k.shape[0], k.shape[2:], k.dtype):
        raise ValueError(
            f"q is {_text(q)} and k {_text(k)}: need the same batch, heads, head_dim and dtype"
        )


def feature_map(given: FeatureMap) -> None:
    """Its name is known."""
    if given.name not in FEATURES:
        raise ValueError(f"no feature map {given.name!r}; there are {sorted(FEATURES)}")


def state(given: State, q: Array, maps: FeatureMap) -> None:
    """kv is `[batch, heads, expanded, head_dim]` and mass `[batch, heads, expanded]`."""
    batch, _, heads, head_dim = q.shape
    weight = maps.q
    mass = (batch, heads, FEATURES[maps.name].count(weight.shape[-1]))
    if given.mass.shape != mass or given.kv.shape != (*mass, head_dim):
        raise ValueError(
            f"state has kv {_text(given.kv)} and mass {_text(given.mass)}: for q {_text(q)} and "
            f"weight {_text(weight)} they need to be {[*mass, head_dim]} and {list(mass)}"
        )
    if {given.kv.dtype, given.mass.dtype} != {jnp.dtype(jnp.float32)}:
        raise ValueError(f"state is {given.kv.dtype} and {given.mass.dtype}: needs float32")


def hedgehog_alone(maps: FeatureMap) -> None:
    """For kernels: NotImplementedError for another map than Hedgehog's."""
    if maps.name != "hedgehog":
        raise NotImplementedError(f"takes Hedgehog's map, got {maps.name}")


def _tokens(name: str, x: Array, weight: Array) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name} is {_text(x)}: needs [batch, tokens, heads, head_dim], none zero")
    if str(x.dtype) not in DTYPES:
        raise ValueError(f"{name} is {_text(x)}: needs one of {', '.join(DTYPES)}")
    if weight.ndim != 3 or weight.shape[:2] != x.shape[2:] or not weight.shape[2]:
        raise ValueError(
            f"feature_map.{name} is {_text(weight)}: for {name} {_text(x)} it needs "
            f"[heads, head_dim, features], [{x.shape[2]}, {x.shape[3]}, any]"
        )


def _text(x: Array) -> str:
    return f"{x.dtype}{list(x.shape)}"
