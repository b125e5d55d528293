"""Linear attention with the Hedgehog feature map: `linear_attention` and its implementations."""

from kernels.linear_attention.interface import FeatureMap, linear_attention

__all__ = ["FeatureMap", "linear_attention"]
