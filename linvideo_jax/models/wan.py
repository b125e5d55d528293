"""The Wan2.1 video transformer, with the self-attention of every layer chosen at run time.

Facts of the architecture: Wan2.1's `wan/modules/model.py` and diffusers' `transformer_wan.py`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.linear_attention import FeatureMap, linear_attention
from kernels.softmax_attention import softmax_attention
from linvideo_jax.errors import UserError
from linvideo_jax.models.module import Params

# How a layer attends to its own tokens: the values of `mode`.
SOFTMAX, LINEAR, MIX = 0, 1, 2

# Wan pads text with zeros to this many tokens and attends to the pads.
TEXT_TOKENS = 512

ROPE_BASE = 10_000.0
MASKED = -1e9


@dataclass(frozen=True)
class WanConfig:
    """Sizes under the key names of diffusers' WanTransformer3DModel; `feature_map` is ours.

    `feature_map`: None, or "hedgehog" if the layers have linear attention too.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: None = None
    added_kv_proj_dim: None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: None = None
    feature_map: str | None = None

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WanConfig":
        """Reads diffusers' config.json; keys that begin with "_" are ignored.

        Raises: UserError for an unknown key, or a variant of the architecture that is not Wan2.1's
        text-to-video model.
        """
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"Unknown keys in the transformer's config: {', '.join(unknown)}.")
        if "patch_size" in values:
            values["patch_size"] = tuple(values["patch_size"])
        config = cls(**values)
        for name in ("cross_attn_norm", "qk_norm", *_IMAGE_TO_VIDEO):
            if getattr(config, name) != getattr(cls, name):
                raise UserError(
                    f"The transformer's config has {name}={getattr(config, name)!r}; only Wan2.1 "
                    f"text-to-video models, {name}={getattr(cls, name)!r}, are supported."
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The values under diffusers' keys, without `feature_map`, ready for JSON."""
        values = asdict(self)
        del values["feature_map"]
        return {**values, "patch_size": list(self.patch_size)}


_IMAGE_TO_VIDEO = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")

_linear_init = nnx.initializers.xavier_uniform()


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, rngs=rngs, **{"kernel_init": _linear_init, **options})


def _layer_norm(x: Float[Array, "... dim"], eps: float) -> Float[Array, "... dim"]:
    """Normalises float32 x over its last axis, without scale and bias."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class Scale(nnx.Module):
    """Weight of an RMS norm."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))


class ScaleBias(nnx.Module):
    """Weight and bias of a layer norm."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: one matrix product over patches."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        patch, shape = config.patch_size, (config.in_channels, config.dim)
        flat = _linear_init(rngs.params(), (int(np.prod(patch)) * shape[0], shape[1]), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(*patch, *shape))
        self.bias = nnx.Param(jnp.zeros(config.dim))

    def __call__(
        self, latents: Float[Array, "batch frames height width channels"]
    ) -> Float[Array, "batch tokens dim"]:
        kernel = self.kernel[...].astype(latents.dtype)
        pt, ph, pw, _, dim = kernel.shape
        b, f, h, w, c = latents.shape
        x = latents.reshape(b, f // pt, pt, h // ph, ph, w // pw, pw, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)
        return x @ kernel.reshape(-1, dim) + self.bias[...].astype(latents.dtype)


class TextEmbedder(nnx.Module):
    """Linear, GELU, Linear: text_dim to dim."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.linear_1 = _linear(config.text_dim, config.dim, rngs, kernel_init=init)
        self.linear_2 = _linear(config.dim, config.dim, rngs, kernel_init=init)

    def __call__(self, text: Float[Array, "batch text text_dim"]) -> Float[Array, "batch text dim"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(text), approximate=True))


class TimeEmbedder(nnx.Module):
    """Sinusoids of the timestep, Linear, SiLU, Linear; all in float32."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.freq_dim = config.freq_dim
        options = {"kernel_init": nnx.initializers.normal(0.02), "precision": "highest"}
        self.linear_1 = _linear(config.freq_dim, config.dim, rngs, **options)
        self.linear_2 = _linear(config.dim, config.dim, rngs, **options)

    def __call__(self, timestep: Float[Array, "batch"]) -> Float[Array, "batch dim"]:
        half = self.freq_dim // 2
        frequencies = (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
        angles = timestep.astype(jnp.float32)[:, None] * frequencies
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ConditionEmbedder(nnx.Module):
    """Embeddings of the timestep and of the text."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.text_embedder = TextEmbedder(config, rngs)
        self.time_embedder = TimeEmbedder(config, rngs)
        self.time_proj = _linear(config.dim, 6 * config.dim, rngs, precision="highest")


class Attention(nnx.Module):
    """Projections and norms of one attention; RMS norms run over all heads together."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v, self.to_out = (
            _linear(config.dim, config.dim, rngs) for _ in range(4)
        )
        self.norm_q, self.norm_k = Scale(config.dim), Scale(config.dim)

    def split_heads(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "..."]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def normed(
        self, x: Float[Array, "batch tokens dim"], norm: Scale
    ) -> Float[Array, "batch tokens heads head_dim"]:
        """RMS norm in float32; the caller rounds once, after the rotation if there is one."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return self.split_heads(x * jax.lax.rsqrt(mean_square + self.eps) * norm.scale[...])


class SelfAttention(Attention):
    """Attention of the video tokens to each other: softmax, linear, or a mixture."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if config.feature_map == "hedgehog":
            self.feature_map = HedgehogMap(config)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        rotation: tuple[Float[Array, "tokens 1 pairs"], Float[Array, "tokens 1 pairs"]],
        r: Float[Array, ""],
        mode: Int[Array, ""] | None,
    ) -> Float[Array, "batch tokens dim"]:
        q = rotate(self.normed(self.to_q(x), self.norm_q), rotation).astype(x.dtype)
        k = rotate(self.normed(self.to_k(x), self.norm_k), rotation).astype(x.dtype)
        v = self.split_heads(self.to_v(x))
        if mode is None:
            out = softmax_attention(q, k, v)
        else:
            maps = FeatureMap(self.feature_map.q[...], self.feature_map.k[...])
            out = jax.lax.switch(mode, (_softmax, _linear_only, _mix), r, q, k, v, maps)
        return self.to_out(out.reshape(x.shape))


def _softmax(r, q, k, v, maps):
    return softmax_attention(q, k, v)


def _linear_only(r, q, k, v, maps):
    return linear_attention(q, k, v, maps)


def _mix(r, q, k, v, maps):
    """LinVideo, eq. 8: r softmax + (1 - r) linear."""
    quadratic = softmax_attention(q, k, v).astype(jnp.float32)
    linear = linear_attention(q, k, v, maps).astype(jnp.float32)
    return (r * quadratic + (1 - r) * linear).astype(v.dtype)


class HedgehogMap(nnx.Module):
    """Hedgehog's projections of queries and keys, per head."""

    def __init__(self, config: WanConfig):
        initial = initial_feature_map(config)
        self.q, self.k = (nnx.Param(jnp.asarray(initial[name][0])) for name in ("q", "k"))


class CrossAttention(Attention):
    """Attention of the video tokens to the text, without positions."""

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        text: Float[Array, "batch text dim"],
        bias: Float[Array, "batch 1 1 text"] | None,
    ) -> Float[Array, "batch tokens dim"]:
        q = self.normed(self.to_q(x), self.norm_q).astype(x.dtype)
        k = self.normed(self.to_k(text), self.norm_k).astype(x.dtype)
        v = self.split_heads(self.to_v(text))
        return self.to_out(softmax_attention(q, k, v, bias=bias).reshape(x.shape))


class FeedForward(nnx.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.linear_1 = _linear(config.dim, config.ffn_dim, rngs)
        self.linear_2 = _linear(config.ffn_dim, config.dim, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class Block(nnx.Module):
    """One layer: self-attention, cross-attention, feed-forward; the residual stream is float32."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.eps = config.eps
        table = jax.random.normal(rngs.params(), (1, 6, config.dim)) / config.dim**0.5
        self.scale_shift_table = nnx.Param(table)
        self.attn1 = SelfAttention(config, rngs)
        self.attn2 = CrossAttention(config, rngs)
        self.norm2 = ScaleBias(config.dim)
        self.ffn = FeedForward(config, rngs)

    def __call__(self, x, text, text_bias, time, rotation, r, mode):
        """x `[batch, tokens, dim]` float32, text in the compute dtype, time `[batch, 6, dim]`."""
        dtype = text.dtype
        modulation = self.scale_shift_table[...] + time
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=1)
        y = (_layer_norm(x, self.eps) * (1 + scale_1) + shift_1).astype(dtype)
        x = x + self.attn1(y, rotation, r, mode).astype(jnp.float32) * gate_1
        y = _layer_norm(x, self.eps) * self.norm2.scale[...] + self.norm2.bias[...]
        x = x + self.attn2(y.astype(dtype), text, text_bias).astype(jnp.float32)
        y = (_layer_norm(x, self.eps) * (1 + scale_2) + shift_2).astype(dtype)
        return x + self.ffn(y).astype(jnp.float32) * gate_2


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
        self.proj_out = _linear(
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
        remat: bool = False,
    ) -> Float[Array, "batch frames height width out_channels"]:
        """The velocity at (latents, timestep), float32.

        timestep: 1000 t, in [0, 1000]. text: the text encoder's output; tokens from text_lengths
        on are zero and stand for the pads up to 512, to which Wan attends: all pads give one and
        the same key, so the first of them with log(512 - length) added to its logits is exact. It
        takes text > length, or text = length = 512. text_lengths None: every token is a key.
        mode: SOFTMAX, LINEAR or MIX for each layer (None: all softmax); r weighs softmax in MIX.
        dtype: of the matrix products; the time embedding, norms, modulation, softmax, residual
        stream and output head are in float32 as in the original.
        remat: the backward pass keeps only the products with weights and recomputes the rest.

        Raises: ValueError if the latents do not divide into patches, or if modes are given to a
        model without a feature map.
        """
        config = self.config
        grid = _patch_grid(latents.shape[1:4], config.patch_size)
        if mode is not None and config.feature_map is None:
            raise ValueError("modes need a model with feature_map='hedgehog'")
        embedder = self.condition_embedder
        time = embedder.time_embedder(timestep)
        time_blocks = embedder.time_proj(jax.nn.silu(time)).reshape(-1, 6, config.dim)
        text_bias = None if text_lengths is None else pad_bias(text_lengths, text.shape[1])
        graph, embedder_params = nnx.split(embedder.text_embedder)
        embed_text = nnx.merge(graph, _cast_products(embedder_params, dtype))
        text = embed_text(text.astype(dtype))
        rotation = rotary_table(grid, config.attention_head_dim)

        graph, layers = nnx.split(self.blocks)

        def layer(x, inputs):
            params, r, mode = inputs
            block = nnx.merge(graph, params)
            return block(x, text, text_bias, time_blocks, rotation, r, mode), None

        if remat:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        r = jnp.ones(config.num_layers) if r is None else r
        mode = None if mode is None else jnp.asarray(mode, jnp.int32)
        x = self.patch_embedding(latents.astype(dtype)).astype(jnp.float32)
        x, _ = jax.lax.scan(layer, x, (_cast_products(layers, dtype), r, mode))

        shift, scale = jnp.split(self.scale_shift_table[...] + time[:, None], 2, axis=1)
        x = self.proj_out(_layer_norm(x, config.eps) * (1 + scale) + shift)
        x = x.reshape(-1, *grid, *config.patch_size, config.out_channels)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(*latents.shape[:4], -1)


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


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions rotate with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    grid: tuple[int, ...], head_dim: int
) -> tuple[Float[Array, "tokens 1 pairs"], Float[Array, "tokens 1 pairs"]]:
    """Cosines and sines, float32 of float64 angles, of the tokens of a grid in row-major order."""
    tables = []
    for axis, (length, dims) in enumerate(zip(grid, rotary_axes(head_dim), strict=True)):
        frequencies = ROPE_BASE ** (-np.arange(0, dims, 2) / dims)
        angles = np.arange(length)[:, None] * frequencies
        shape = [1, 1, 1, dims // 2]
        shape[axis] = length
        tables.append(angles.reshape(shape))

    def table(function):
        # Broadcast by XLA: a long video's full table is too large to be a constant.
        parts = [
            jnp.broadcast_to(function(angles).astype(np.float32), (*grid, angles.shape[-1]))
            for angles in tables
        ]
        return jnp.concatenate(parts, axis=-1).reshape(-1, 1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    table: tuple[Float[Array, "tokens 1 pairs"], Float[Array, "tokens 1 pairs"]],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates the pairs (x[2i], x[2i + 1]) by the table's angles."""
    cos, sin = table
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def initial_feature_map(config: WanConfig) -> dict[str, np.ndarray]:
    """Feature maps to start from: `q` and `k` `[layers, heads, head_dim, head_dim // 2]` float32.

    W selects every other rotary pair, so each of the three axes is seen at fine and coarse
    frequencies, and scales it by head_dim^(1/4): then phi(q) phi(k) agrees to first order in q k
    with softmax attention's exp(q k / sqrt(head_dim)), if the pairs left out are like the others.
    """
    head_dim = config.attention_head_dim
    pairs = np.arange(head_dim // 2)
    order = np.concatenate([pairs[0::2], pairs[1::2]])
    columns = np.stack([2 * order, 2 * order + 1], axis=-1).reshape(-1)[: head_dim // 2]
    weight = np.zeros((head_dim, head_dim // 2), np.float32)
    weight[columns, np.arange(head_dim // 2)] = head_dim**0.25
    shape = (config.num_layers, config.num_attention_heads, *weight.shape)
    return {name: np.broadcast_to(weight, shape).copy() for name in ("q", "k")}
