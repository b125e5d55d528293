"""Wan2.1's causal video VAE (diffusers' AutoencoderKLWan), channels-last.

Height and width shrink by 8, frames 1 + 4n become 1 + n latent frames. `encode` and `decode` take
the whole video in one pass (training); `encode_chunks` and `decode_chunks` give the same numbers in
bounded memory, a few frames at a time. Parameter names are diffusers' with `weight` as `kernel` and
`gamma` as `scale`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from linvideo_jax.errors import UserError
from linvideo_jax.models.module import Params, bind
from linvideo_jax.models.vae_layers import (
    Conv,
    Downsample,
    Frames,
    History,
    MidBlock,
    Norm,
    ResidualBlock,
    Upsample,
    Video,
    causal_conv,
    norm_silu_conv,
)

# Keys of diffusers' config that this model has at one value only (others belong to Wan2.2's VAE).
_FIXED = {
    "attn_scales": (),
    "dropout": 0.0,
    "in_channels": 3,
    "is_residual": False,
    "out_channels": 3,
    "patch_size": None,
}

# While one is copied and used, as many are decoded; they follow each other without a gap.
PIECES_AHEAD = 2


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE under diffusers' names, and the latents' statistics (lengths z_dim).

    Raises UserError if the lengths of its tuples do not fit each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    def __post_init__(self):
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries, but dim_mult "
                f"{self.dim_mult} needs one fewer than its own {len(self.dim_mult)}."
            )
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            raise UserError(
                f"latents_mean and latents_std have {len(self.latents_mean)} and "
                f"{len(self.latents_std)} entries, but z_dim is {self.z_dim}: give one per channel."
            )

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels per latent pixel along height and along width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def scale_factor_temporal(self) -> int:
        """Frames per latent frame after the first."""
        return 2 ** sum(self.temperal_downsample)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """From diffusers' vae/config.json; UserError for what Wan2.1's VAE does not have."""
        config = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in config.items()
            if not key.startswith("_") and not key.startswith("scale_factor_")
        }
        known = {field.name for field in fields(cls)}
        for key in config.keys() - known:
            if key not in _FIXED:
                raise UserError(f"Unknown key {key!r} in the VAE's config: remove it.")
            if config[key] != _FIXED[key]:
                raise UserError(
                    f"The VAE's config has {key}={config[key]!r}, but only Wan2.1's VAE "
                    f"({key}={_FIXED[key]!r}) is supported: use a Wan2.1 checkpoint."
                )
        return cls(**{key: value for key, value in config.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The config that diffusers reads: `from_dict` of it is this object."""
        config = {field.name: getattr(self, field.name) for field in fields(self)} | _FIXED
        config["scale_factor_spatial"] = self.scale_factor_spatial
        config["scale_factor_temporal"] = self.scale_factor_temporal
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


class Encoder(nnx.Module):
    """Video to 2 z_dim moments."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.base_dim
        self.conv_in = Conv((3, 3, 3), 3, channels, rngs=rngs)
        blocks = []
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(channels, config.base_dim * mult, rngs=rngs))
                channels = config.base_dim * mult
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(channels, config.temperal_downsample[level], rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels, rngs=rngs)
        self.norm_out = Norm(channels)
        self.conv_out = Conv((3, 3, 3), channels, 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Video, history: History) -> Video:
        x = causal_conv(x, self.conv_in, history)
        for block in self.down_blocks:
            x = block(x, history)
        x = self.mid_block(x, history)
        return norm_silu_conv(x, self.norm_out, self.conv_out, history)


class UpBlock(nnx.Module):
    """num_res_blocks + 1 residual blocks, then perhaps an Upsample (`temporal` None: none)."""

    def __init__(
        self, channels: int, features: int, count: int, temporal: bool | None, *, rngs: nnx.Rngs
    ):
        widths = (channels, *(count - 1) * [features])
        self.resnets = nnx.List([ResidualBlock(width, features, rngs=rngs) for width in widths])
        self.upsamplers = nnx.List(
            [] if temporal is None else [Upsample(features, temporal, rngs=rngs)]
        )

    def __call__(self, x: Video, history: History) -> Video:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, history)
        return x


class Decoder(nnx.Module):
    """Latents to video."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        base = config.decoder_base_dim or config.base_dim
        channels = base * config.dim_mult[-1]
        self.conv_in = Conv((3, 3, 3), config.z_dim, channels, rngs=rngs)
        self.mid_block = MidBlock(channels, rngs=rngs)
        blocks = []
        temporal = (*reversed(config.temperal_downsample), None)
        for mult, doubled in zip(reversed(config.dim_mult), temporal, strict=True):
            blocks.append(
                UpBlock(channels, base * mult, config.num_res_blocks + 1, doubled, rngs=rngs)
            )
            channels = base * mult // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = Norm(base * config.dim_mult[0])
        self.conv_out = Conv((3, 3, 3), base * config.dim_mult[0], 3, rngs=rngs)

    def __call__(self, x: Video, history: History) -> Video:
        x = causal_conv(x, self.conv_in, history)
        x = self.mid_block(x, history)
        for block in self.up_blocks:
            x = block(x, history)
        return norm_silu_conv(x, self.norm_out, self.conv_out, history)


class WanVAE(nnx.Module):
    """Wan2.1's VAE. `dtype` is the dtype of the computation; parameters and results are float32."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Conv((1, 1, 1), 2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = Conv((1, 1, 1), config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, video: Float[Array, "batch frames height width 3"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Video, Video]:
        """Mean and log variance of the latents of a video in [-1, 1], in one pass.

        Both [batch, 1 + (frames - 1) / 4, height / 8, width / 8, z_dim] float32, not normalized,
        the log variance within [-30, 20]. UserError unless frames are 4n + 1 and sizes divisible
        by 8.
        """
        check_video(video.shape, self.config)
        return self.encode_piece(video, History(), dtype)

    def decode(
        self,
        latents: Float[Array, "batch frames height width z_dim"],
        dtype: DTypeLike = jnp.float32,
    ) -> Video:
        """Video of (not normalized) latents, in one pass.

        [batch, 4 (frames - 1) + 1, 8 height, 8 width, 3] float32, not clipped.
        """
        return self.decode_piece(latents, History(), dtype)

    def encode_chunks(
        self, video: Float[Array, "batch frames height width 3"], dtype: DTypeLike = jnp.float32
    ) -> tuple[Video, Video]:
        """`encode` in bounded memory: 1, 4, 4, ... frames at a time."""
        check_video(video.shape, self.config)
        size = self.config.scale_factor_temporal
        mean, logvar = by_pieces(_encode_step, self, video, size, dtype)
        return mean, logvar

    def decode_chunks(
        self,
        latents: Float[Array, "batch frames height width z_dim"],
        dtype: DTypeLike = jnp.float32,
    ) -> Video:
        """`decode` in bounded memory, one latent frame at a time, clipped to [-1, 1]."""
        (video,) = by_pieces(_decode_step, self, latents, 1, dtype)
        return video

    def decode_pixels(
        self,
        latents: Float[Array, "batch frames height width z_dim"],
        dtype: DTypeLike = jnp.float32,
    ) -> Iterator[UInt8[np.ndarray, "batch frames height width 3"]]:
        """`decode_chunks` as pixels in the host's memory: 1 frame and then 4 at a time.

        The device decodes the next pieces while one is used.
        """
        return _to_host(video for (video,) in _pieces(_pixels_step, self, latents, 1, dtype))

    @jax.named_scope("vae_encode")
    def encode_piece(self, video: Video, history: History, dtype: DTypeLike) -> tuple[Video, Video]:
        """`encode` of the frames that follow those in `history`, which is brought forward."""
        moments = self.quant_conv(self.encoder(video.astype(dtype), history))
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    @jax.named_scope("vae_decode")
    def decode_piece(self, latents: Video, history: History, dtype: DTypeLike) -> Video:
        """`decode` of the latents that follow those in `history`, which is brought forward."""
        latents = self.post_quant_conv(latents.astype(dtype))
        return self.decoder(latents, history).astype(jnp.float32)


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="past")
def _encode_step(config, params, video, past, dtype):
    history = History(past)
    moments = bind(WanVAE, config, params).encode_piece(video, history, dtype)
    return moments, history.present


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="past")
def _decode_step(config, params, latents, past, dtype):
    history = History(past)
    video = bind(WanVAE, config, params).decode_piece(latents, history, dtype)
    return (jnp.clip(video, -1.0, 1.0),), history.present


@partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="past")
def _pixels_step(config, params, latents, past, dtype):
    (video,), present = _decode_step.__wrapped__(config, params, latents, past, dtype)
    return (pixels(video),), present


def pixels(video: Video) -> UInt8[Array, "batch frames height width 3"]:
    """[-1, 1] as the 256 levels of a picture; of JAX or of numpy, as the video is."""
    return ((video + 1) * 127.5).round().astype(jnp.uint8)


def by_pieces(step: Callable, vae: WanVAE, x: Video, size: int, dtype: DTypeLike):
    """`step` over the first frame and then `size` frames at a time; its results joined in time."""
    results = _pieces(step, vae, x, size, dtype)
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*results, strict=True))


def _pieces(step: Callable, vae: WanVAE, x: Video, size: int, dtype: DTypeLike) -> Iterator[tuple]:
    params: Params = nnx.to_pure_dict(nnx.state(vae))
    past: list[Frames] | None = None
    for start in range(1 - size, x.shape[1], size):
        piece = x[:, max(start, 0) : start + size]
        result, past = step(vae.config, params, piece, past, jnp.dtype(dtype))
        yield result


def _to_host(arrays: Iterable[Array]) -> Iterator[np.ndarray]:
    """The arrays in the host's memory; the next ones are asked for before one is waited for."""
    asked: deque[Array] = deque()
    for array in arrays:
        array.copy_to_host_async()
        asked.append(array)
        if len(asked) > PIECES_AHEAD:
            yield np.asarray(asked.popleft())
    yield from map(np.asarray, asked)


def check_video(shape: tuple[int, ...], config: VAEConfig) -> None:
    """UserError unless such a video can be encoded: frames 4n + 1, sizes divisible by 8."""
    _, frames, height, width, _ = shape
    temporal, spatial = config.scale_factor_temporal, config.scale_factor_spatial
    if frames < 1 or (frames - 1) % temporal:
        raise UserError(
            f"The video has {frames} frames, but the VAE needs {temporal}n + 1 of them: take "
            f"{max(frames - 1, 0) // temporal * temporal + 1}."
        )
    if height % spatial or width % spatial:
        raise UserError(
            f"The video is {height} x {width} pixels, but the VAE needs height and width divisible "
            f"by {spatial}: crop or resize it."
        )


def normalize(latents: Video, config: VAEConfig) -> Video:
    """(z - latents_mean) / latents_std: what the transformer works on."""
    return (latents - jnp.array(config.latents_mean)) / jnp.array(config.latents_std)


def denormalize(latents: Video, config: VAEConfig) -> Video:
    """z std + mean: what the decoder works on."""
    return latents * jnp.array(config.latents_std) + jnp.array(config.latents_mean)
