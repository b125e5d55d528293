"""Prompts and seeds to latents and videos, with any checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from linvideo_jax.errors import UserError
from linvideo_jax.flow import grids, rectified, solvers
from linvideo_jax.models.module import bind
from linvideo_jax.models.umt5 import UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE, denormalize
from linvideo_jax.models.wan import LINEAR, SOFTMAX, TEXT_TOKENS, WanConfig, WanTransformer

# Text is padded to the next multiple of this many tokens: one compilation for each.
TEXT_BUCKET = 32


@dataclass(frozen=True)
class Settings:
    """How a video is sampled; a UserError names the field that is out of range.

    height, width in px; guidance_scale 1 is no guidance; flow_shift 1 is an even time grid.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    sampler: str
    negative_prompt: str = ""

    def __post_init__(self):
        check_settings(**asdict(self))

    @classmethod
    def of(cls, checkpoint: Any, **overrides: Any) -> "Settings":
        """The checkpoint's defaults with every override that is not None put in their place."""
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls(**{**checkpoint.sampling, **given})


def check_settings(**settings: Any) -> None:
    """UserError for the first value that is out of range; a value of None is not looked at."""
    ranges = {
        "height": (1, 8192),
        "width": (1, 8192),
        "num_frames": (1, 8193),
        "num_inference_steps": (1, 1000),
        "guidance_scale": (1, 30),
        "flow_shift": (0.01, 100),
    }
    for name, (low, high) in ranges.items():
        value = settings.get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}: choose a value from {low} to {high}.")
    sampler = settings.get("sampler")
    if sampler is not None and sampler not in solvers.SAMPLERS:
        raise UserError(
            f"the sampler {sampler!r} is unknown: choose one of {', '.join(solvers.SAMPLERS)}."
        )


def latent_shape(
    wan: WanConfig, vae: VAEConfig, height: int, width: int, num_frames: int
) -> tuple[int, int, int, int]:
    """[frames, height, width, channels] of the latents of one video.

    UserError if the frames are not 4k + 1 or a side is not divisible by the VAE's stride times the
    transformer's patch.
    """
    temporal, spatial = vae.scale_factor_temporal, vae.scale_factor_spatial
    if (num_frames - 1) % temporal:
        below = (num_frames - 1) // temporal * temporal + 1
        raise UserError(
            f"num_frames is {num_frames}, but it must be {temporal}k + 1: "
            f"choose {below} or {below + temporal}."
        )
    frames = (num_frames - 1) // temporal + 1
    if frames % wan.patch_size[0]:
        raise UserError(
            f"{num_frames} frames are {frames} latent frames, which patches of "
            f"{wan.patch_size[0]} do not divide: choose another num_frames."
        )
    for name, pixels, patch in (
        ("height", height, wan.patch_size[1]),
        ("width", width, wan.patch_size[2]),
    ):
        if pixels % (spatial * patch):
            raise UserError(
                f"{name} is {pixels}, but it must be divisible by {spatial * patch}: "
                f"choose {max(1, round(pixels / (spatial * patch))) * spatial * patch}."
            )
    return frames, height // spatial, width // spatial, wan.in_channels


def noise(
    seeds: Sequence[int], shape: tuple[int, ...]
) -> Float[Array, "videos frames height width channels"]:
    """Standard normal latents, float32; each video's from its own seed alone."""
    draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))
    return draw(jnp.asarray(np.asarray(seeds, np.uint32)))


def text_bucket(length: int) -> int:
    """The padded length of a text: room for one pad token, unless all of Wan's 512 are taken."""
    return min((length // TEXT_BUCKET + 1) * TEXT_BUCKET, TEXT_TOKENS)


@partial(jax.jit, static_argnames=("config", "sampler", "sigmas", "dtype"))
def denoise(
    params: dict[str, Any],
    noise: Float[Array, "videos frames height width channels"],
    text: Float[Array, "halves*videos tokens text_dim"],
    lengths: Int[Array, " halves*videos"],
    guidance_scale: Float[Array, ""],
    mode: Int[Array, " layers"] | None,
    *,
    config: WanConfig,
    sampler: str,
    sigmas: tuple[float, ...],
    dtype: Any,
) -> Float[Array, "videos frames height width channels"]:
    """The whole sampling loop, from noise to latents; the latents stay float32 between the steps.

    `text` holds the prompts and, behind them, the negative prompts: both halves pass the network as
    one batch. With the prompts alone there is no guidance.
    """
    model = bind(WanTransformer, config, params)
    halves = text.shape[0] // noise.shape[0]

    def velocity(x, timestep):
        timesteps = jnp.full((text.shape[0],), timestep)
        u = model(jnp.concatenate([x] * halves), timesteps, text, lengths, mode=mode, dtype=dtype)
        if halves == 1:
            return u
        return rectified.guided(*jnp.split(u, 2), guidance_scale)

    grid = np.array(sigmas)
    times = grids.network_timesteps(grid, sampler)
    return solvers.sample(velocity, noise, grid, sampler, times=times)


@partial(jax.jit, static_argnames=("config", "dtype"))
def _encode_text(params, ids, lengths, config, dtype):
    return bind(UMT5Encoder, config, params)(ids, lengths, dtype=dtype)


class Pipeline:
    """A checkpoint (`checkpoints.load`) ready to sample.

    `dtype` is that of the networks' matrix products, the VAE's excepted, which runs in float32 as
    Wan's does; by default bfloat16 on an accelerator and float32 on a CPU.
    """

    def __init__(self, checkpoint: Any, dtype: Any = None):
        self.checkpoint = checkpoint
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        self.mode = None
        if checkpoint.linear_layers:
            self.mode = np.full(checkpoint.wan_config.num_layers, SOFTMAX, np.int32)
            self.mode[list(checkpoint.linear_layers)] = LINEAR

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """[frames, height, width, channels] of one video's latents; UserError for a wrong size."""
        size = (settings.height, settings.width, settings.num_frames)
        return latent_shape(self.checkpoint.wan_config, self.checkpoint.vae_config, *size)

    def encode_prompts(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "prompts tokens text_dim"], Int[np.ndarray, " prompts"]]:
        """Text embeddings, padded to the bucket of the longest, zero from `lengths` on."""
        ids, lengths = self.checkpoint.tokenizer.encode(list(prompts))
        return self._encode(ids[:, : text_bucket(max(lengths))], lengths), lengths

    def batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int,
        start: Float[Array, "videos frames height width channels"] | None = None,
    ) -> Iterator[tuple[list[int], Float[Array, "rows frames height width channels"]]]:
        """Latents as they get ready: (indices of `prompts`, their latents).

        A batch holds prompts of one padded length, and the last one of a length is filled up to
        `batch_size`: so a video's numbers depend on its prompt, seed, settings and the batch size,
        never on its neighbours. `start` takes the place of the seeds' noise.
        """
        checkpoint, shape = self.checkpoint, self.latent_shape(settings)
        sigmas = grids.sigma_grid(settings.num_inference_steps, settings.flow_shift)
        guided = settings.guidance_scale > 1
        texts = [*prompts, settings.negative_prompt] if guided else list(prompts)
        ids, lengths = checkpoint.tokenizer.encode(texts)
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        shortest = lengths[-1] if guided else 0
        buckets = [text_bucket(max(n, shortest)) for n in lengths[: len(prompts)]]
        for bucket in sorted(set(buckets)):
            rows = [i for i, b in enumerate(buckets) if b == bucket]
            if guided:
                negative = self._encode(ids[-1:, :bucket], lengths[-1:])
                negative = jnp.repeat(negative, batch_size, axis=0)
            for first in range(0, len(rows), batch_size):
                real = rows[first : first + batch_size]
                filled = np.array(real + real[-1:] * (batch_size - len(real)))
                text, counts = self._encode(ids[filled, :bucket], lengths[filled]), lengths[filled]
                if guided:
                    text = jnp.concatenate([text, negative])
                    counts = np.concatenate([counts, np.repeat(lengths[-1], batch_size)])
                latents = denoise(
                    checkpoint.transformer,
                    noise(np.asarray(seeds)[filled], shape) if start is None else start[filled],
                    text,
                    jnp.asarray(counts, jnp.int32),
                    jnp.float32(settings.guidance_scale),
                    self.mode,
                    config=checkpoint.wan_config,
                    sampler=settings.sampler,
                    sigmas=tuple(sigmas.tolist()),
                    dtype=self.dtype,
                )
                yield real, latents[: len(real)]

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int,
        start: Float[Array, "videos frames height width channels"] | None = None,
    ) -> Float[np.ndarray, "videos frames height width channels"]:
        """The latents of all prompts, in their order, float32."""
        found = {}
        for rows, latents in self.batches(prompts, seeds, settings, batch_size, start):
            found |= zip(rows, np.asarray(latents), strict=True)
        return np.stack([found[i] for i in range(len(prompts))])

    def decode(
        self, latents: Float[Array, "videos frames height width channels"]
    ) -> UInt8[np.ndarray, "videos frames height width 3"]:
        """Pixels of the transformer's latents."""
        config = self.checkpoint.vae_config
        vae = bind(WanVAE, config, self.checkpoint.vae)
        video = vae.decode_chunks(denormalize(jnp.asarray(latents), config))
        return np.asarray(jnp.round((video + 1) * 127.5).astype(jnp.uint8))

    def _encode(self, ids, lengths) -> Float[Array, "prompts tokens text_dim"]:
        ids, lengths = jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)
        config = self.checkpoint.umt5_config
        return _encode_text(self.checkpoint.text_encoder, ids, lengths, config, self.dtype)
