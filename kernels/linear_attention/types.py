"""What linear attention's functions take and return besides plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


@partial(jax.tree_util.register_dataclass, data_fields=("q", "k"), meta_fields=("name",))
@dataclass(frozen=True)
class FeatureMap:
    """Projections of queries and of keys (float32, not tied over heads), and what is made of them.

    name: of `feature_maps.FEATURES`; static, so another name is another program.
    """

    q: Float[Array, "heads head_dim features"]
    k: Float[Array, "heads head_dim features"]
    name: str = "hedgehog"


class State(NamedTuple):
    """All that queries see of a set of keys, in float32: a sum over the keys, of fixed size.

    The states of disjoint sets of keys add up to the state of their union.
    """

    kv: Float32[Array, "batch heads expanded head_dim"]
    """Sum of phi_k(k) v^T."""
    mass: Float32[Array, "batch heads expanded"]
    """Sum of phi_k(k)."""
