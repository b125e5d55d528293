"""Linear attention with the Hedgehog feature map: `linear_attention` and its implementations."""

from kernels.linear_attention.interface import (
    apply_state,
    combine_states,
    linear_attention,
    linear_attention_state,
)
from kernels.linear_attention.types import FeatureMap, State

__all__ = [
    "FeatureMap",
    "State",
    "apply_state",
    "combine_states",
    "linear_attention",
    "linear_attention_state",
]
