"""The Wan2.1 video transformer, with the self-attention of every layer chosen at run time.

Facts of the architecture: Wan2.1's `wan/modules/model.py` and diffusers' `transformer_wan.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from linvideo_jax.models.module import Params
from linvideo_jax.models.remat import rematerialised
from linvideo_jax.models.rotary import rotary_table
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.models.wan_layers import (
    Block,
    ConditionEmbedder,
    PatchEmbedding,
    initial_feature_map,
    layer_norm,
    linear,
)

__all__ = [
    "LINEAR",
    "MIX",
    "SOFTMAX",
    "TEXT_TOKENS",
    "WanConfig",
    "WanTransformer",
    "initial_feature_map",
    "pad_bias",
]

# How a layer attends to its own tokens: the values of `mode`, in the order of its branches.
SOFTMAX, LINEAR, MIX = 0, 1, 2

# Wan pads text with zeros to this many tokens and attends to the pads.
TEXT_TOKENS = 512

MASKED = -1e9


class WanTransformer(nnx.Module):
    """Wan2.1's text-to-video transformer; the parameters of its layers are stacked on axis 0."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embedding = PatchEmbedding(config, rngs)
        self.condition_embedder = ConditionEmbedder(config, rngs)
        create = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
        self.blocks = create(rngs.split(config.num_layers))
        table = jax.random.normal(rngs.params(), (1, 2, config.dim)) / config.dim**0.5
        self.scale_shift_table = nnx.Param(table)
        self.proj_out = linear(
            config.dim,
            int(np.prod(config.patch_size)) * config.out_channels,
            rngs,
            kernel_init=nnx.initializers.zeros,
            precision="highest",
        )

    def __call__(
        self,
        latents: Float[Array, "batch frames height width channels"],
        timestep: Float[Array, "batch"],
        text: Float[Array, "batch text text_dim"],
        text_lengths: Int[Array, "batch"] | None,
        *,
        r: Float[Array, "layers"] | None = None,
        mode: Int[Array, "layers"] | None = None,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
    ) -> Float[Array, "batch frames height width out_channels"]:
        """The velocity at (latents, timestep), float32.

        timestep: 1000 t, in [0, 1000]. text: the text encoder's output; tokens from text_lengths
        on are zero and stand for the pads up to 512, to which Wan attends: all pads give one and
        the same key, so the first of them with log(512 - length) added to its logits is exact. It
        takes text > length, or text = length = 512. text_lengths None: every token is a key.
        mode: SOFTMAX, LINEAR or MIX for each layer (None: all softmax); r weighs softmax in MIX.
        dtype: of the matrix products; the time embedding, norms, modulation, softmax, residual
        stream and output head are in float32 as in the original.
        remat: what the backward pass keeps (`remat.POLICIES`).

        Raises: ValueError if the latents do not divide into patches, or if modes are given to a
        model without a feature map.
        """
        config = self.config
        if mode is not None and config.feature_map is None:
            raise ValueError("modes need a model with a feature_map")
        x, time, block, layers = self._layers(latents, timestep, text, text_lengths, dtype)

        def layer(x, inputs):
            params, r, mode = inputs
            return block(params, x, r, mode), None

        layer = rematerialised(layer, remat)
        r = jnp.ones(config.num_layers) if r is None else r
        mode = None if mode is None else jnp.asarray(mode, jnp.int32)
        x, _ = jax.lax.scan(layer, x, (layers, r, mode))

        shift, scale = jnp.split(self.scale_shift_table[...] + time[:, None], 2, axis=1)
        x = self.proj_out(layer_norm(x, config.eps) * (1 + scale) + shift)
        grid = _patch_grid(latents.shape[1:4], config.patch_size)
        x = x.reshape(-1, *grid, *config.patch_size, config.out_channels)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(*latents.shape[:4], -1)

    def attention_errors(
        self,
        latents: Float[Array, "batch frames height width channels"],
        timestep: Float[Array, "batch"],
        text: Float[Array, "batch text text_dim"],
        text_lengths: Int[Array, "batch"] | None,
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> Float[Array, "layers"]:
        """How far each layer's linear attention is from its softmax attention, both at softmax's x.

        Squared error of the heads' outputs over their mean square, float32; its gradient reaches
        the feature maps alone. Arguments as for a call.
        """
        x, _, block, layers = self._layers(latents, timestep, text, text_lengths, dtype)

        def layer(x, params):
            x, error = block(params, x, None, None, measure=True)
            return jax.lax.stop_gradient(x), error

        return jax.lax.scan(layer, jax.lax.stop_gradient(x), layers)[1]

    def _layers(self, latents, timestep, text, text_lengths, dtype):
        """(tokens, time embedding, block(params, x, r, mode, **options), its stacked params)."""
        grid = _patch_grid(latents.shape[1:4], self.config.patch_size)
        embedder = self.condition_embedder
        time = embedder.time_embedder(timestep)
        time_blocks = embedder.time_proj(jax.nn.silu(time)).reshape(-1, 6, self.config.dim)
        text_bias = None if text_lengths is None else pad_bias(text_lengths, text.shape[1])
        text_graph, embedder_params = nnx.split(embedder.text_embedder)
        embed_text = nnx.merge(text_graph, _cast_products(embedder_params, dtype))
        text = embed_text(text.astype(dtype))
        rotation = rotary_table(grid, self.config.attention_head_dim)
        graph, layers = nnx.split(self.blocks)

        def block(params, x, r, mode, **options):
            layer = nnx.merge(graph, params)
            return layer(x, text, text_bias, time_blocks, rotation, r, mode, **options)

        x = self.patch_embedding(latents.astype(dtype)).astype(jnp.float32)
        return x, time, block, _cast_products(layers, dtype)


def _patch_grid(size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    if any(length % patch for length, patch in zip(size, patch_size, strict=True)):
        raise ValueError(f"latents of {size} do not divide into patches of {patch_size}")
    return tuple(length // patch for length, patch in zip(size, patch_size, strict=True))


def _cast_products(state: nnx.State, dtype: jnp.dtype) -> Params:
    """Casts the parameters of matrix products; norms, modulation and feature maps stay as is.

    For all layers at once, before the scan: casts of single layers would each be a small kernel.
    """

    def cast(tree):
        if "kernel" in tree:
            return {name: value.astype(dtype) for name, value in tree.items()}
        return {k: cast(v) if isinstance(v, dict) else v for k, v in tree.items()}

    return cast(nnx.to_pure_dict(state))


def pad_bias(
    lengths: Int[Array, "batch"], text_tokens: int
) -> Float[Array, "batch 1 1 text_tokens"]:
    """Added to the logits of text keys: 0, then log(512 - length) at the pad key, then a mask."""
    position = jnp.arange(text_tokens)
    lengths = lengths[:, None]
    pads = jnp.log(jnp.maximum(TEXT_TOKENS - lengths, 1).astype(jnp.float32))
    bias = jnp.where(position < lengths, 0.0, jnp.where(position == lengths, pads, MASKED))
    return bias[:, None, None, :]
