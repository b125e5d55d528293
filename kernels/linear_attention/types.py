"""What linear attention's functions take and return besides plain arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


class FeatureMap(NamedTuple):
    """Hedgehog's projections, one for queries and one for keys (float32, not tied over heads)."""

    q: Float[Array, "heads head_dim features"]
    k: Float[Array, "heads head_dim features"]


class State(NamedTuple):
    """All that queries see of a set of keys, in float32: a sum over the keys, of fixed size.

    The states of disjoint sets of keys add up to the state of their union.
    """

    kv: Float32[Array, "batch heads double_features head_dim"]
    """Sum of phi_k(k) v^T."""
    mass: Float32[Array, "batch heads double_features"]
    """Sum of phi_k(k)."""
