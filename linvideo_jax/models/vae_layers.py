"""Layers of Wan2.1's causal video VAE.

Every layer works on `[batch, frames, height, width, channels]` in the dtype of its input
(parameters stay float32 and are cast where they are used) and on any piece of a video: `History`
hands on from one piece to the next the frames that causal convolutions look back to. The whole
video is one piece.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Video = Float[Array, "batch frames height width channels"]
Frames = Float[Array, "batch past height width channels"]


class History:
    """What causal layers saw before a piece of a video, in the order in which they are visited.

    `past` is the `present` that the piece before left behind, None at the start of the video.
    """

    def __init__(self, past: Sequence[Frames] | None = None):
        self.starts = past is None
        self.present: list[Frames] = []
        self._past = iter(past or ())

    def before(self) -> Frames | None:
        """The frames that the layer being visited kept; None at the start."""
        return None if self.starts else next(self._past)

    def keep(self, frames: Frames) -> None:
        """Stores the frames that this layer needs before the next piece."""
        self.present.append(frames)


class Conv(nnx.Module):
    """Parameters of a convolution: `kernel [*window, in, out]`, `bias [out]`."""

    def __init__(self, window: tuple[int, ...], channels: int, features: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_random_kernel(rngs.params(), (*window, channels, features)))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Video, stride: int = 1, padding: str = "SAME") -> Video:
        """Applies it to each frame alone; a window with a time axis must have length 1 there."""
        kernel = self.kernel[...]
        if kernel.ndim == 5:
            kernel = kernel[0]
        return convolve_frames(x, kernel, self.bias[...], stride, padding)


def _random_kernel(key, shape):
    """Uniform with variance 1 / fan-in."""
    size = math.prod(shape)
    bound = math.sqrt(3 * shape[-1] / size)
    # Sizes are powers of two so that the generator is compiled for a few of them, not for each
    # kernel: 3 against 15 seconds.
    table = 2 ** (size - 1).bit_length()
    return jax.random.uniform(key, (table,), minval=-bound, maxval=bound)[:size].reshape(shape)


class Norm(nnx.Module):
    """Parameters of the RMS norm: `scale [channels]`."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))


def convolve_frames(x, kernel, bias, stride=1, padding="SAME"):
    """2D convolution of every frame; kernel [height, width, in, out]."""
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel.astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:]) + bias.astype(x.dtype)


def convolve_time(x, kernel, bias, stride=1):
    """3D convolution, unpadded in time, "SAME" in space; kernel [time, height, width, in, out].

    The taps in time are put side by side on the channels of one 2D convolution: on two cores 2 to 4
    times as fast as a 3D one, forward and backward.
    """
    taps, height, width, channels, features = kernel.shape
    end = x.shape[1] - taps + 1
    x = jnp.concatenate([x[:, tap : tap + end : stride] for tap in range(taps)], axis=-1)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(height, width, taps * channels, features)
    return convolve_frames(x, kernel, bias)


def prepend(before: Frames | None, x: Video, count: int) -> Video:
    """`x` after the `count` frames before it; zeros where the video starts."""
    if before is None:
        return jnp.pad(x, ((0, 0), (count, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([before, x], axis=1)


def causal_conv(x: Video, conv: Conv, history: History) -> Video:
    """3x3x3 convolution that looks two frames back and none ahead."""
    x = prepend(history.before(), x, 2)
    history.keep(x[:, -2:])
    return convolve_time(x, conv.kernel[...], conv.bias[...])


def rms_norm(x, scale):
    """x / |x| * sqrt(channels) * scale, in float32 within, so that nothing in float32 is stored."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    factor = math.sqrt(x.shape[-1]) * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    return (wide * factor * scale).astype(x.dtype)


@jax.checkpoint
def _norm_silu_conv(x, before, scale, kernel, bias):
    # The backward pass needs x alone: norm, SiLU and taps are cheap to make again, and the
    # convolution's own result is not needed there.
    x = prepend(before, jax.nn.silu(rms_norm(x, scale)), 2)
    return convolve_time(x, kernel, bias), x[:, -2:]


def norm_silu_conv(x: Video, norm: Norm, conv: Conv, history: History) -> Video:
    """RMS norm, SiLU and a causal 3x3x3 convolution."""
    x, seen = _norm_silu_conv(
        x, history.before(), norm.scale[...], conv.kernel[...], conv.bias[...]
    )
    history.keep(seen)
    return x


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU and causal convolution, and a pointwise shortcut where the width changes."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs):
        self.norm1 = Norm(channels)
        self.conv1 = Conv((3, 3, 3), channels, features, rngs=rngs)
        self.norm2 = Norm(features)
        self.conv2 = Conv((3, 3, 3), features, features, rngs=rngs)
        if channels != features:
            self.conv_shortcut = Conv((1, 1, 1), channels, features, rngs=rngs)

    def __call__(self, x: Video, history: History) -> Video:
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        x = norm_silu_conv(x, self.norm1, self.conv1, history)
        return shortcut + norm_silu_conv(x, self.norm2, self.conv2, history)


class AttentionBlock(nnx.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = Norm(channels)
        self.to_qkv = Conv((1, 1), channels, 3 * channels, rngs=rngs)
        self.proj = Conv((1, 1), channels, channels, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        batch, frames, height, width, channels = x.shape
        qkv = self.to_qkv(rms_norm(x, self.norm.scale[...]))
        qkv = qkv.reshape(batch * frames, height * width, 1, 3 * channels)
        y = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))
        return x + self.proj(y.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs)])
        self.resnets = nnx.List([ResidualBlock(channels, channels, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Video, history: History) -> Video:
        x = self.resnets[0](x, history)
        return self.resnets[1](self.attentions[0](x), history)


class PadEnd(nnx.Module):
    """One row of zeros below and one column to the right."""

    def __call__(self, x: Video) -> Video:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))


class Nearest(nnx.Module):
    """Height and width doubled by repeating pixels."""

    def __call__(self, x: Video) -> Video:
        return x.repeat(2, axis=2).repeat(2, axis=3)


class Downsample(nnx.Module):
    """Height and width halved; with `temporal` 1 + 2n frames become 1 + n.

    The first frame of a video takes no part in time: it passes as it is and only serves as the
    oldest frame of the window [0, 1, 2] that makes the second.
    """

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs):
        self.temporal = temporal
        self.resample = nnx.List([PadEnd(), Conv((3, 3), channels, channels, rngs=rngs)])
        if temporal:
            self.time_conv = Conv((3, 1, 1), channels, channels, rngs=rngs)

    def __call__(self, x: Video, history: History) -> Video:
        pad, conv = self.resample
        x = conv(pad(x), stride=2, padding="VALID")
        if not self.temporal:
            return x
        first = x[:, :1] if history.starts else x[:, :0]
        x = prepend(history.before(), x, 0)
        history.keep(x[:, -1:])
        if x.shape[1] == 1:
            return first
        conv = self.time_conv
        later = convolve_time(x, conv.kernel[...], conv.bias[...], stride=2)
        return jnp.concatenate([first, later], axis=1)


class Upsample(nnx.Module):
    """Height and width doubled, channels halved; with `temporal` 1 + n frames become 1 + 2n.

    The first frame of a video takes no part in time: it passes as it is, and the causal convolution
    that makes two frames of each later one sees zeros in its place.
    """

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs):
        self.temporal = temporal
        self.resample = nnx.List([Nearest(), Conv((3, 3), channels, channels // 2, rngs=rngs)])
        if temporal:
            self.time_conv = Conv((3, 1, 1), channels, 2 * channels, rngs=rngs)

    def __call__(self, x: Video, history: History) -> Video:
        if self.temporal:
            x = self._double_frames(x, history)
        repeat, conv = self.resample
        return conv(repeat(x))

    def _double_frames(self, x: Video, history: History) -> Video:
        first, x = (x[:, :1], x[:, 1:]) if history.starts else (x[:, :0], x)
        batch, frames, height, width, channels = x.shape
        x = prepend(history.before(), x, 2)
        history.keep(x[:, -2:])
        if frames == 0:
            return first
        x = convolve_time(x, self.time_conv.kernel[...], self.time_conv.bias[...])
        x = jnp.moveaxis(x.reshape(batch, frames, height, width, 2, channels), 4, 2)
        x = x.reshape(batch, 2 * frames, height, width, channels)
        return jnp.concatenate([first, x], axis=1)
