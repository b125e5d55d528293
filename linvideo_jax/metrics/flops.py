"""Floating-point operations of the transformer, counted from its sizes.

A multiplication with its addition counts as two; matrix products alone are counted, since the
rest is far below a percent.
"""

import math
from collections.abc import Sequence

from linvideo_jax.models.wan import TEXT_TOKENS, WanConfig


def video_tokens(config: WanConfig, latent_shape: Sequence[int]) -> int:
    """Tokens of one video of latents [frames, height, width, ...]."""
    sides = zip(latent_shape[:3], config.patch_size, strict=True)
    tokens = 1
    for side, patch in sides:
        tokens *= side // patch
    return tokens


def softmax_attention(config: WanConfig, tokens: int) -> int:
    """One layer's self-attention after its projections: Q K^T and its product with V."""
    return 4 * tokens**2 * config.dim


def linear_attention(config: WanConfig, tokens: int) -> int:
    """The same by features: the two projections, K^T V, Q (K^T V); Hedgehog without a feature map.

    A projection is [head_dim, head_dim / 2]. Hedgehog and ReLU make as many features as head_dim of
    it, whose mirrored half costs nothing; Taylor's are 1, the projection and its products.
    """
    head_dim = config.attention_head_dim
    projected = head_dim // 2
    features = 1 + projected + projected**2 if config.feature_map == "taylor" else 2 * projected
    return tokens * config.dim * (4 * projected + 4 * features)


def cross_attention(config: WanConfig, tokens: int, text_tokens: int = TEXT_TOKENS) -> int:
    """One layer's cross-attention after its projections: Q K^T and its product with V."""
    return 4 * tokens * text_tokens * config.dim


def weight_products(config: WanConfig, tokens: int, text_tokens: int = TEXT_TOKENS) -> int:
    """One layer's products with weights: self-attention's four projections, cross-attention's of
    queries, output and text, the feed-forward."""
    dim = config.dim
    return 2 * tokens * (6 * dim**2 + 2 * dim * config.ffn_dim) + 2 * text_tokens * 2 * dim**2


def ends(config: WanConfig, tokens: int, text_tokens: int = TEXT_TOKENS) -> int:
    """What is outside of the layers: patches, output head, embeddings of text and time."""
    dim, patch = config.dim, math.prod(config.patch_size)
    patches = 2 * tokens * dim * patch * (config.in_channels + config.out_channels)
    text = 2 * text_tokens * dim * (config.text_dim + dim)
    return patches + text + 2 * dim * (config.freq_dim + 7 * dim)


def forward(
    config: WanConfig,
    tokens: int,
    linear_layers: Sequence[int] = (),
    text_tokens: int = TEXT_TOKENS,
    mixed_layers: Sequence[int] = (),
) -> int:
    """One forward of one video, of one half of guidance.

    tokens: of the video (`video_tokens`); text_tokens: keys of cross-attention; mixed_layers:
    those that compute softmax and linear attention both.
    """
    layer = weight_products(config, tokens, text_tokens)
    layer += cross_attention(config, tokens, text_tokens)
    linear, mixed = len(linear_layers), len(mixed_layers)
    attention = (config.num_layers - linear) * softmax_attention(config, tokens)
    attention += (linear + mixed) * linear_attention(config, tokens)
    return config.num_layers * layer + attention + ends(config, tokens, text_tokens)


def saved(
    config: WanConfig,
    tokens: int,
    linear_layers: Sequence[int],
    text_tokens: int = TEXT_TOKENS,
) -> float:
    """Share of a forward's operations that the linear layers save, in [0, 1)."""
    whole = forward(config, tokens, (), text_tokens)
    return 1 - forward(config, tokens, linear_layers, text_tokens) / whole
