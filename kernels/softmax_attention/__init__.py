"""Softmax attention: `softmax_attention` and its implementations."""

from kernels.softmax_attention.interface import softmax_attention

__all__ = ["softmax_attention"]
