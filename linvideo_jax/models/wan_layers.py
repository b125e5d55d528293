"""Layers of the Wan2.1 transformer; `wan.py` stacks and scans them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.dispatch import platform
from kernels.linear_attention import FeatureMap
from kernels.mixture import mix
from linvideo_jax.models.layout import WHOLE, Layout
from linvideo_jax.models.rotary import Rotation, rotate, rotate_on_gpu
from linvideo_jax.models.wan_config import WanConfig

_linear_init = nnx.initializers.xavier_uniform()


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, rngs=rngs, **{"kernel_init": _linear_init, **options})


def layer_norm(x: Float[Array, "... dim"], eps: float) -> Float[Array, "... dim"]:
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

    @jax.named_scope("patch_embedding")
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
        self.linear_1 = linear(config.text_dim, config.dim, rngs, kernel_init=init)
        self.linear_2 = linear(config.dim, config.dim, rngs, kernel_init=init)

    def __call__(self, text: Float[Array, "batch text text_dim"]) -> Float[Array, "batch text dim"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(text), approximate=True))


class TimeEmbedder(nnx.Module):
    """Sinusoids of the timestep, Linear, SiLU, Linear; all in float32."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.freq_dim = config.freq_dim
        options = {"kernel_init": nnx.initializers.normal(0.02), "precision": "highest"}
        self.linear_1 = linear(config.freq_dim, config.dim, rngs, **options)
        self.linear_2 = linear(config.dim, config.dim, rngs, **options)

    def __call__(
        self, timestep: Float[Array, "*batch"], layout: Layout
    ) -> Float[Array, "*batch dim"]:
        half = self.freq_dim // 2
        frequencies = (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
        angles = timestep.astype(jnp.float32)[..., None] * frequencies
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = jax.nn.silu(self.linear_1(layout.features(x)))
        return self.linear_2(layout.features(x))


class TimeEmbedding(NamedTuple):
    """What the network knows of the time, float32: in the head, and in every block."""

    head: Float[Array, "*batch dim"]
    blocks: Float[Array, "*batch 6 dim"]


class ConditionEmbedder(nnx.Module):
    """Embeddings of the timestep and of the text."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.text_embedder = TextEmbedder(config, rngs)
        self.time_embedder = TimeEmbedder(config, rngs)
        self.time_proj = linear(config.dim, 6 * config.dim, rngs, precision="highest")

    @jax.named_scope("time_embedding")
    def embed_time(self, timestep: Float[Array, "*batch"], layout: Layout = WHOLE) -> TimeEmbedding:
        """Of timesteps in [0, 1000]; of all steps of a sampler at once, one product each."""
        head = self.time_embedder(timestep, layout)
        blocks = layout.rows(self.time_proj(layout.features(jax.nn.silu(head))))
        head = layout.rows(head)
        return TimeEmbedding(head, blocks.reshape(*head.shape[:-1], 6, head.shape[-1]))


class Attention(nnx.Module):
    """Projections and norms of one attention; RMS norms run over all heads together."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v, self.to_out = (
            linear(config.dim, config.dim, rngs) for _ in range(4)
        )
        self.norm_q, self.norm_k = Scale(config.dim), Scale(config.dim)

    def split_heads(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "..."]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def normed(
        self, x: Float[Array, "batch tokens dim"], norm: Scale, rotation: Rotation | None = None
    ) -> Float[Array, "batch tokens heads head_dim"]:
        """RMS norm, and rotation if one is given, in float32, rounded once to the dtype of x."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        inverse, scale = jax.lax.rsqrt(mean_square + self.eps), norm.scale[...]
        if rotation is None:
            heads = self.split_heads(wide * inverse * scale)
        elif platform() == "gpu":
            # With the root behind, x is read for the sum of its squares, then read, normed,
            # rotated and rounded by one kernel; else the normed heads pass through memory.
            heads = rotate_on_gpu(self.split_heads(wide * scale), rotation) * inverse[..., None]
        else:
            heads = rotate(self.split_heads(wide * inverse * scale), rotation)
        return heads.astype(x.dtype)


class SelfAttention(Attention):
    """Attention of the video tokens to each other: softmax, linear, or a mixture."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.features = config.feature_map
        if config.feature_map is not None:
            self.feature_map = FeatureProjections(config)

    @jax.named_scope("self_attention")
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        rotation: Rotation,
        r: Float[Array, ""],
        mode: Int[Array, ""] | None,
        layout: Layout,
    ) -> Float[Array, "batch tokens dim"]:
        q, k, v = self.heads_of(x, rotation)
        if mode is None:
            out = _softmax(layout, r, q, k, v, None)
        else:
            branches = [partial(branch, layout) for branch in (_softmax, _linear_only, _mix)]
            out = jax.lax.switch(mode, branches, r, q, k, v, self.maps())
        return self.to_out(out.reshape(x.shape))

    @jax.named_scope("queries_keys_values")
    def heads_of(self, x, rotation):
        """Normed and rotated q and k, and v, each `[batch, tokens, heads, head_dim]`."""
        q = self.normed(self.to_q(x), self.norm_q, rotation)
        k = self.normed(self.to_k(x), self.norm_k, rotation)
        return q, k, self.split_heads(self.to_v(x))

    def maps(self) -> FeatureMap:
        return FeatureMap(self.feature_map.q[...], self.feature_map.k[...], self.features)

    def with_error(
        self, x, rotation, layout: Layout
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, ""]]:
        """Softmax attention, and the relative squared error of the linear one at the same heads.

        The error's gradient reaches the feature maps alone.
        """
        q, k, v = jax.lax.stop_gradient(self.heads_of(x, rotation))
        out = layout.softmax_attention(q, k, v)
        wanted = out.astype(jnp.float32)
        linear = layout.linear_attention(q, k, v, self.maps()).astype(jnp.float32)
        # Pads add zero to both sums.
        error = jnp.sum(jnp.square(linear - wanted)) / jnp.sum(jnp.square(wanted))
        return self.to_out(out.reshape(x.shape)), error


@jax.named_scope("softmax")
def _softmax(layout, r, q, k, v, maps):
    return layout.softmax_attention(q, k, v)


@jax.named_scope("linear")
def _linear_only(layout, r, q, k, v, maps):
    return layout.linear_attention(q, k, v, maps)


@jax.named_scope("mix")
def _mix(layout, r, q, k, v, maps):
    """LinVideo, eq. 8: r softmax + (1 - r) linear."""
    return mix(r, layout.softmax_attention(q, k, v), layout.linear_attention(q, k, v, maps))


class FeatureProjections(nnx.Module):
    """The feature map's projections of queries and keys, per head."""

    def __init__(self, config: WanConfig):
        initial = initial_feature_map(config)
        self.q, self.k = (nnx.Param(jnp.asarray(initial[name][0])) for name in ("q", "k"))


class TextKeys(NamedTuple):
    """Keys and values of a text in the compute dtype; of all layers on axis 0, or of one."""

    k: Float[Array, "*layers batch text heads head_dim"]
    v: Float[Array, "*layers batch text heads head_dim"]


class CrossAttention(Attention):
    """Attention of the video tokens to the text, without positions."""

    @jax.named_scope("text_keys")
    def keys(self, text: Float[Array, "batch text dim"]) -> TextKeys:
        """What the video tokens see of an embedded text, the same at every step of a sampler."""
        k = self.normed(self.to_k(text), self.norm_k)
        return TextKeys(k, self.split_heads(self.to_v(text)))

    @jax.named_scope("cross_attention")
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        keys: TextKeys,
        bias: Float[Array, "batch 1 1 text"] | None,
        layout: Layout,
    ) -> Float[Array, "batch tokens dim"]:
        q = self.normed(self.to_q(x), self.norm_q)
        return self.to_out(layout.cross_attention(q, *keys, bias).reshape(x.shape))


class FeedForward(nnx.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs):
        self.linear_1 = linear(config.dim, config.ffn_dim, rngs)
        self.linear_2 = linear(config.ffn_dim, config.dim, rngs)

    @jax.named_scope("feed_forward")
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

    def __call__(self, x, keys, text_bias, time, rotation, layout, r, mode, measure: bool = False):
        """x `[batch, tokens, dim]` float32, keys `TextKeys` of this layer, time `[#batch, 6, dim]`.

        Returns the next x; with `measure` (x, `SelfAttention.with_error`'s error).
        """
        dtype = keys.v.dtype
        modulation = self.scale_shift_table[...] + time
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=1)
        y = (layer_norm(x, self.eps) * (1 + scale_1) + shift_1).astype(dtype)
        if measure:
            attended, error = self.attn1.with_error(y, rotation, layout)
        else:
            attended, error = self.attn1(y, rotation, r, mode, layout), None
        x = x + attended.astype(jnp.float32) * gate_1
        y = layer_norm(x, self.eps) * self.norm2.scale[...] + self.norm2.bias[...]
        x = x + self.attn2(y.astype(dtype), keys, text_bias, layout).astype(jnp.float32)
        y = (layer_norm(x, self.eps) * (1 + scale_2) + shift_2).astype(dtype)
        x = x + self.ffn(y).astype(jnp.float32) * gate_2
        return (x, error) if measure else x


def initial_feature_map(config: WanConfig) -> dict[str, np.ndarray]:
    """Feature maps to start from: `q` and `k` `[layers, heads, head_dim, head_dim // 2]` float32.

    W selects every other rotary pair, so each of the three axes is seen at fine and coarse
    frequencies, and scales it by c = sqrt(sqrt(head_dim) / 2). Then phi(q) phi(k), which grows as
    1 + c^2 (q k) / features, and softmax attention's exp(q k / sqrt(head_dim)) agree to first
    order on the pairs selected; on random rotated heads the divergence between the two attentions
    was least near this scale, and changed little with the selection. Taylor's products are
    1 + s + s^2 / 2 of s = y_q y_k, so its W has the scale at which s is q k / sqrt(head_dim);
    ReLU's cancels in the division.
    """
    head_dim = config.attention_head_dim
    pairs = np.arange(head_dim // 2)
    order = np.concatenate([pairs[0::2], pairs[1::2]])
    columns = np.stack([2 * order, 2 * order + 1], axis=-1).reshape(-1)[: head_dim // 2]
    weight = np.zeros((head_dim, head_dim // 2), np.float32)
    scale = (head_dim**0.5 / 2) ** 0.5 if config.feature_map != "taylor" else head_dim**-0.25
    weight[columns, np.arange(head_dim // 2)] = scale
    shape = (config.num_layers, config.num_attention_heads, *weight.shape)
    return {name: np.broadcast_to(weight, shape).copy() for name in ("q", "k")}
