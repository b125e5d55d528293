"""Linear attention as a function of arrays."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from kernels.dispatch import dispatch
from kernels.linear_attention import reference

IMPLEMENTATIONS = {"reference": reference.linear_attention}


class FeatureMap(NamedTuple):
    """Hedgehog's projections, one for queries and one for keys (float32, not tied over heads)."""

    q: Float[Array, "heads head_dim features"]
    k: Float[Array, "heads head_dim features"]


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """phi_q(q) (phi_k(k)^T v) / (phi_q(q) sum phi_k(k)), not causal (LinVideo, eq. 5 and 6).

    phi(x) = [softmax(x W), softmax(-x W)] over the features (Hedgehog): 2 x features numbers per
    token and head, and no 1/sqrt(head_dim). q, k, v share one dtype, which is the output's; sums
    over tokens, features and the division are in float32.
    `implementation`: "reference", several names in order of preference, or None for the first
    that supports the inputs.

    Raises: NotImplementedError with the reason if no named implementation supports the inputs.
    """
    return dispatch(IMPLEMENTATIONS, implementation, q, k, v, feature_map)
