"""Linear attention as functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernels.dispatch import dispatch
from kernels.linear_attention import checks, pallas_gpu, pallas_tpu, reference
from kernels.linear_attention.types import FeatureMap, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# In the order of preference.
IMPLEMENTATIONS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "reference": reference}


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    *,
    key_lengths: Int[Array, " batch"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """phi_q(q) (phi_k(k)^T v) / (phi_q(q) sum phi_k(k)), not causal (LinVideo, eq. 5 and 6).

    phi(x) = [softmax(x W), softmax(-x W)] over the features (Hedgehog): 2 x features numbers per
    token and head, and no 1/sqrt(head_dim); other maps, by `feature_map.name`, are in
    `feature_maps` and run on the reference alone. q, k, v share one dtype (bfloat16, float16 or
    float32), which is the output's; sums over tokens, features and the division are in float32.
    Where the denominator is zero (no key, or all products of features underflow) the output is
    zero.
    `key_lengths`: only the first key_lengths[b] keys count (None: all); the others may be
    anything, and their gradients are zero.
    `implementation`: "pallas_tpu", "pallas_gpu", "reference", several names in order of
    preference, or None for the first that supports the inputs.

    Raises: ValueError for shapes or dtypes that do not fit together; NotImplementedError with the
    reasons if no named implementation supports the inputs.
    """
    checks.feature_map(feature_map)
    checks.keys_and_values(k, v, feature_map.k, key_lengths)
    checks.queries(q, feature_map.q)
    checks.queries_and_keys(q, k)
    functions = {name: module.linear_attention for name, module in IMPLEMENTATIONS.items()}
    return dispatch(functions, implementation, q, k, v, feature_map, key_lengths)


def linear_attention_state(
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    *,
    key_lengths: Int[Array, " batch"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> State:
    """What queries see of these keys; add states of several sets of keys by `combine_states`.

    `key_lengths`, `implementation`, Raises: as `linear_attention`.
    """
    checks.feature_map(feature_map)
    checks.keys_and_values(k, v, feature_map.k, key_lengths)
    functions = {name: module.linear_attention_state for name, module in IMPLEMENTATIONS.items()}
    return dispatch(functions, implementation, k, v, feature_map, key_lengths)


def combine_states(first: State, *others: State) -> State:
    """State of all the keys together: the sum (between devices, `jax.lax.psum` of a state)."""
    for state in others:
        first = State(first.kv + state.kv, first.mass + state.mass)
    return first


def apply_state(
    q: Float[Array, "batch tokens heads head_dim"],
    state: State,
    feature_map: FeatureMap,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Attention of q to the keys of `state`, in q's dtype.

    `implementation`, Raises: as `linear_attention`.
    """
    checks.feature_map(feature_map)
    checks.queries(q, feature_map.q)
    checks.state(state, q, feature_map)
    functions = {name: module.apply_state for name, module in IMPLEMENTATIONS.items()}
    return dispatch(functions, implementation, q, state, feature_map)
