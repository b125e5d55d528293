"""The Wan2.1 video transformer, with the self-attention of every layer chosen at run time.

Facts of the architecture: Wan2.1's `wan/modules/model.py` and diffusers' `transformer_wan.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.dispatch import platform
from linvideo_jax.models.layout import WHOLE, Layout
from linvideo_jax.models.module import Params
from linvideo_jax.models.remat import rematerialised
from linvideo_jax.models.rotary import rotary_table
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.models.wan_layers import (
    Block,
    ConditionEmbedder,
    PatchEmbedding,
    TextKeys,
    TimeEmbedding,
    initial_feature_map,
    layer_norm,
    linear,
)

__all__ = [
    "LINEAR",
    "MIX",
    "SOFTMAX",
    "TEXT_TOKENS",
    "Text",
    "TimeEmbedding",
    "WanConfig",
    "WanTransformer",
    "cast_products",
    "initial_feature_map",
    "pad_bias",
    "pads_are_keys",
]

# How a layer attends to its own tokens: the values of `mode`, in the order of its branches.
SOFTMAX, LINEAR, MIX = 0, 1, 2

# Wan pads text with zeros to this many tokens and attends to the pads.
TEXT_TOKENS = 512

MASKED = -1e9


class Text(NamedTuple):
    """A text as the layers see it (`WanTransformer.embed_text`): no step of a sampler changes it.

    keys: of all layers; bias: of their logits, or None.
    """

    keys: TextKeys
    bias: Float[Array, "batch 1 1 text"] | None


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
        timestep: Float[Array, "batch"] | TimeEmbedding,
        text: Float[Array, "batch text text_dim"] | Text,
        text_lengths: Int[Array, "batch"] | None,
        *,
        r: Float[Array, "layers"] | None = None,
        mode: Int[Array, "layers"] | None = None,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        layout: Layout | None = None,
    ) -> Float[Array, "batch frames height width out_channels"]:
        """The velocity at (latents, timestep), float32.

        timestep: 1000 t, in [0, 1000]. text: the text encoder's output; tokens from text_lengths
        on are zero and stand for the pads up to 512, to which Wan attends. It takes text > length,
        or text = length = 512. text_lengths None: every token is a key.
        A sampler computes both once instead, by `embed_time`, whose batch may be 1, and
        `embed_text`; text_lengths are in the latter.
        mode: SOFTMAX, LINEAR or MIX for each layer (None: all softmax); r weighs softmax in MIX.
        dtype: of the matrix products; the time embedding, norms, modulation, softmax, residual
        stream and output head are in float32 as in the original.
        remat: what the backward pass keeps (`remat.POLICIES`).
        layout: on which devices the tokens and the parameters lie (None: on one).

        Raises: ValueError if the latents do not divide into patches, or if modes are given to a
        model without a feature map.
        """
        config = self.config
        if mode is not None and config.feature_map is None:
            raise ValueError("modes need a model with a feature map")
        grid = _patch_grid(latents.shape[1:4], config.patch_size)
        layout = (layout or WHOLE).for_tokens(int(np.prod(grid)))
        inputs = latents, timestep, text, text_lengths
        x, time, block, layers = self._layers(*inputs, dtype, grid, layout)

        def layer(x, inputs):
            params, keys, r, mode = inputs
            return block(params, keys, x, r, mode), None

        layer = rematerialised(layer, remat)
        r = jnp.ones(config.num_layers) if r is None else r
        mode = None if mode is None else jnp.asarray(mode, jnp.int32)
        x, _ = jax.lax.scan(layer, x, (*layers, r, mode))

        with jax.named_scope("head"):
            shift, scale = jnp.split(self.scale_shift_table[...] + time.head[:, None], 2, axis=1)
            x = layout.leave(self.proj_out(layer_norm(x, config.eps) * (1 + scale) + shift))
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
        layout: Layout | None = None,
    ) -> Float[Array, "layers"]:
        """How far each layer's linear attention is from its softmax attention, both at softmax's x.

        Squared error of the heads' outputs over their mean square, float32; its gradient reaches
        the feature maps alone. Arguments as for a call.
        """
        grid = _patch_grid(latents.shape[1:4], self.config.patch_size)
        layout = (layout or WHOLE).for_tokens(int(np.prod(grid)))
        inputs = latents, timestep, text, text_lengths
        x, _, block, layers = self._layers(*inputs, dtype, grid, layout)

        def layer(x, inputs):
            x, error = block(*inputs, x, None, None, measure=True)
            return jax.lax.stop_gradient(x), error

        return jax.lax.scan(layer, jax.lax.stop_gradient(x), layers)[1]

    def embed_time(self, timestep: Float[Array, "*batch"]) -> TimeEmbedding:
        """Embeddings of timesteps, 1000 t, to give to a call in their place."""
        return self.condition_embedder.embed_time(timestep)

    def embed_text(
        self,
        text: Float[Array, "batch text text_dim"],
        text_lengths: Int[Array, "batch"] | None,
        *,
        video_tokens: int,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout | None = None,
    ) -> Text:
        """Keys and values of a text in every layer, to give to calls of this dtype in its place.

        text, text_lengths, layout: as of a call; video_tokens: how many will attend to it.
        """
        layout = layout or WHOLE
        text, bias = self._embedded(text, text_lengths, video_tokens, dtype)
        graph, layers = nnx.split(self.blocks.attn2)

        def layer(_, params):
            return None, nnx.merge(graph, layout.layer(params)).keys(text)

        return Text(jax.lax.scan(layer, None, cast_products(layers, dtype))[1], bias)

    @jax.named_scope("text_embedding")
    def _embedded(self, text, text_lengths, video_tokens, dtype):
        """(embedded text in dtype, bias of its logits)."""
        bias = None
        if text_lengths is not None and pads_are_keys(video_tokens):
            text = jnp.pad(text, ((0, 0), (0, TEXT_TOKENS - text.shape[1]), (0, 0)))
        elif text_lengths is not None:
            bias = pad_bias(text_lengths, text.shape[1])
        graph, params = nnx.split(self.condition_embedder.text_embedder)
        return nnx.merge(graph, cast_products(params, dtype))(text.astype(dtype)), bias

    def _layers(self, latents, timestep, text, text_lengths, dtype, grid, layout):
        """(tokens, time, block(params, keys, x, r, mode, **options), (its params, its keys)).

        The last two are stacked; keys of None are made in the block, of the text that is given.
        """
        time = timestep
        if not isinstance(timestep, TimeEmbedding):
            time = self.condition_embedder.embed_time(timestep, layout)
        if isinstance(text, Text):
            embedded, (keys, bias) = None, text
        else:
            embedded, bias = self._embedded(text, text_lengths, int(np.prod(grid)), dtype)
            keys = None
        table = rotary_table(grid, self.config.attention_head_dim)
        rotation = tuple(layout.enter(part, axis=0) for part in table)
        graph, layers = nnx.split(self.blocks)

        def block(params, keys, x, r, mode, **options):
            layer = nnx.merge(graph, layout.layer(params))
            keys = layer.attn2.keys(embedded) if keys is None else keys
            return layer(x, keys, bias, time.blocks, rotation, layout, r, mode, **options)

        x = layout.enter(self.patch_embedding(latents.astype(dtype)).astype(jnp.float32), axis=1)
        return x, time, block, (cast_products(layers, dtype), keys)


def _patch_grid(size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    if any(length % patch for length, patch in zip(size, patch_size, strict=True)):
        raise ValueError(f"latents of {size} do not divide into patches of {patch_size}")
    return tuple(length // patch for length, patch in zip(size, patch_size, strict=True))


def cast_products(state: nnx.State | Params, dtype: jnp.dtype) -> Params:
    """Casts the parameters of matrix products; norms, modulation and feature maps stay as is.

    For all layers at once, before the scan: casts of single layers would each be a small kernel.
    """

    def cast(tree):
        if "kernel" in tree:
            return {name: value.astype(dtype) for name, value in tree.items()}
        return {k: cast(v) if isinstance(v, dict) else v for k, v in tree.items()}

    return cast(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)


def pads_are_keys(video_tokens: int) -> bool:
    """Whether the pads up to 512 are keys of their own, or one key with a bias stands for all.

    Both are exact. Without a bias flash attention does it: at 32,760 tokens of 1.3B 0.10 TFLOP a
    layer, 0.2 ms of an H100. With one, logits and float32 outputs pass through its memory, 1 GB for
    32 keys and 2 for 160, 0.4 and 0.8 ms. On a CPU, and where the video has few tokens itself, so
    that 512 of text would double the work, fewer keys are quicker.
    """
    return platform() != "cpu" and video_tokens >= 8 * TEXT_TOKENS


def pad_bias(
    lengths: Int[Array, "batch"], text_tokens: int
) -> Float[Array, "batch 1 1 text_tokens"]:
    """Added to the logits of text keys: 0, then log(512 - length) at the pad key, then a mask.

    All pads give one and the same key: the first of them with this bias is as good as all.
    """
    position = jnp.arange(text_tokens)
    lengths = lengths[:, None]
    pads = jnp.log(jnp.maximum(TEXT_TOKENS - lengths, 1).astype(jnp.float32))
    bias = jnp.where(position < lengths, 0.0, jnp.where(position == lengths, pads, MASKED))
    return bias[:, None, None, :]
