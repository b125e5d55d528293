"""UMT5 text encoder: T5 with a relative position bias of its own in every layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from linvideo_jax.errors import UserError


@dataclass(frozen=True)
class UMT5Config:
    """Sizes under transformers' config.json names; the defaults are those of Wan's umt5-xxl."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise UserError(
                f"UMT5's feed_forward_proj is {self.feed_forward_proj!r}: "
                "only 'gated-gelu' is known."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UMT5Config":
        """The encoder's sizes out of a transformers config.json.

        Other keys are ignored: transformers adds its generic ones (decoding, labels, decoder) to
        every such file, and they differ between its versions. UserError for another architecture.
        """
        if config.get("model_type", "umt5") != "umt5":
            raise UserError(
                f"The text encoder's model_type is {config['model_type']!r}: only 'umt5' is known."
            )
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self) -> dict[str, Any]:
        """The fields, a dict that `from_dict` and transformers' UMT5Config both take."""
        return asdict(self)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of the distance key - query, int32 `[query, key]`, bidirectional (T5, section 2.1).

    Half of the buckets are for keys behind the query. Of each half, the first half counts single
    steps and the rest grows with the logarithm up to max_distance; farther is the last bucket.
    """
    positions = np.arange(length)
    distance = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    steps = np.abs(distance)
    # float32 as in T5's code: in float64 some exact powers would fall into the next bucket.
    ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(steps < exact, steps, far) + half * (distance > 0)).astype(np.int32)


class Linear(nnx.Module):
    """`x @ kernel` in the dtype of x, no bias."""

    def __init__(self, inputs: int, outputs: int, std: float, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return x @ self.kernel[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, read by index."""

    def __init__(self, entries: int, features: int, std: float, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (entries, features)))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        return self.embedding[...][ids]


class RMSNorm(nnx.Module):
    """Scales to unit root mean square, no mean taken off; float32 inside and out."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]


class Attention(nnx.Module):
    """Self-attention without scaling of the logits; the scale sits in q's initial values."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        d, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = Linear(d, inner, (d * config.d_kv) ** -0.5, rngs=rngs)
        self.k = Linear(d, inner, d**-0.5, rngs=rngs)
        self.v = Linear(d, inner, d**-0.5, rngs=rngs)
        self.o = Linear(inner, d, inner**-0.5, rngs=rngs)
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets, config.num_heads, d**-0.5, rngs=rngs
        )

    @jax.named_scope("self_attention")
    def __call__(
        self,
        x: Float[Array, "batch tokens d_model"],
        buckets: Int[Array, "tokens tokens"],
        valid: Bool[Array, "batch tokens"],
    ) -> Float[Array, "batch tokens d_model"]:
        """`valid` says which keys may be seen."""
        batch, tokens, _ = x.shape
        q, k, v = (f(x).reshape(batch, tokens, self.heads, -1) for f in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).transpose(2, 0, 1)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) + bias
        logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, -1))


class FeedForward(nnx.Module):
    """GELU-gated feed-forward layer: wo(gelu(wi_0 x) * wi_1 x), GELU by tanh."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        d, hidden = config.d_model, config.d_ff
        self.wi_0 = Linear(d, hidden, d**-0.5, rngs=rngs)
        self.wi_1 = Linear(d, hidden, d**-0.5, rngs=rngs)
        self.wo = Linear(hidden, d, hidden**-0.5, rngs=rngs)

    @jax.named_scope("feed_forward")
    def __call__(self, x: Float[Array, "batch tokens d_model"]) -> Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class Block(nnx.Module):
    """Attention, then feed-forward, each after a norm and added to the float32 stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, x, buckets, valid, dtype):
        x = x + self.attention(self.attention_norm(x).astype(dtype), buckets, valid)
        return x + self.ffn(self.ffn_norm(x).astype(dtype))


class UMT5Encoder(nnx.Module):
    """Token ids to text embeddings; the parameters of all layers are stacked on axis 0.

    Initial values are T5's: logits are of order one without the usual 1/sqrt(d_kv), since q's
    standard deviation holds it; embeddings have unit variance.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, 1.0, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(config, rngs=rngs)

        self.blocks = stacked(rngs)
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    @jax.named_scope("text_encoder")
    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        lengths: Int[Array, "batch"],
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> Float[Array, "batch tokens d_model"]:
        """Text embeddings, float32, zero from `lengths` on; tokens from there on are never seen.

        ids are in [0, vocab_size), lengths at least 1 (the end-of-sequence token). The matrix
        products run in `dtype`; norms, softmax and the residual stream are float32.
        """
        tokens = ids.shape[1]
        buckets = jnp.asarray(
            relative_position_buckets(
                tokens,
                self.config.relative_attention_num_buckets,
                self.config.relative_attention_max_distance,
            )
        )
        valid = jnp.arange(tokens) < lengths[:, None]
        graph, layers = nnx.split(self.blocks)

        def layer(x, state):
            return nnx.merge(graph, state)(x, buckets, valid, dtype), None

        x, _ = jax.lax.scan(layer, self.shared(ids).astype(jnp.float32), layers)
        return jnp.where(valid[..., None], self.final_layer_norm(x), 0.0)
