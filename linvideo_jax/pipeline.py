"""Prompts and seeds to latents and videos, with any checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from linvideo_jax import compiled_programs
from linvideo_jax.errors import UserError
from linvideo_jax.flow import grids, rectified, solvers
from linvideo_jax.metrics.flops import video_tokens
from linvideo_jax.models.module import Params, bind
from linvideo_jax.models.vae import VAEConfig, WanVAE, denormalize, pixels
from linvideo_jax.models.vae_tiles import decode_tiles
from linvideo_jax.models.wan import (
    LINEAR,
    SOFTMAX,
    TEXT_TOKENS,
    TimeEmbedding,
    WanConfig,
    WanTransformer,
    cast_products,
    pads_are_keys,
)
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import pictures
from linvideo_jax.parallel.placement import Placement
from linvideo_jax.text import TextEmbeddings, text_bucket
from linvideo_jax.turns import Turns, mark

# In bfloat16 against float32: relative error of a text embedding, and of a velocity; PSNR in dB of
# decoded videos. (Rounding to 255 levels is 59 dB.)
BFLOAT16_BOUND, VAE_PSNR_BOUND = 0.01, 45.0


@dataclass(frozen=True)
class Settings:
    """How a video is sampled; a UserError names the field that is out of range.

    height, width in px; guidance_scale 1 is no guidance; flow_shift 1 is an even time grid;
    time_grid is that of diffusers or of Wan's original code; denoising_steps, the list of a
    distilled model (timesteps before the shift, from 1000 down), takes its place.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    sampler: str
    negative_prompt: str = ""
    time_grid: str = "diffusers"
    denoising_steps: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.denoising_steps is not None:
            object.__setattr__(self, "denoising_steps", tuple(map(float, self.denoising_steps)))
        check_settings(**asdict(self))

    @classmethod
    def of(cls, checkpoint: Any, **overrides: Any) -> "Settings":
        """The checkpoint's defaults with every override that is not None put in their place."""
        return cls(**overridden(checkpoint.sampling, overrides))

    def changed(self, overrides: Mapping[str, Any]) -> "Settings":
        """These with every override that is not None put in their place."""
        return Settings(**overridden(asdict(self), overrides))

    def sigmas(self) -> Float[np.ndarray, " steps+1"]:
        """The time grid, from noise to 0."""
        return grids.sigma_grid(
            self.num_inference_steps,
            self.flow_shift,
            self.time_grid,
            self.sampler,
            self.denoising_steps,
        )


def overridden(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings by name, with every override that is not None put in their place.

    Of the count of steps and a distilled model's list, the one that is given decides the other; a
    sampler that such a model is not sampled with takes its own grid.
    """
    known = [field.name for field in fields(Settings)]
    if unknown := [key for key in overrides if key not in known]:
        raise UserError(
            f"{unknown[0]!r} is no setting of sampling: choose among {', '.join(known)}."
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    merged = {**defaults, **given}
    if "denoising_steps" in given:
        if "num_inference_steps" not in given:
            merged["num_inference_steps"] = len(given["denoising_steps"])
    elif merged.get("denoising_steps") is not None and (
        merged["num_inference_steps"] != len(merged["denoising_steps"])
        or merged["sampler"] not in solvers.FEW_STEP_SAMPLERS
    ):
        merged["denoising_steps"] = None
    return merged


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
    for name, known in (("sampler", solvers.SAMPLERS), ("time_grid", grids.GRIDS)):
        value = settings.get(name)
        if value is not None and value not in known:
            raise UserError(f"the {name} {value!r} is unknown: choose one of {', '.join(known)}.")
    steps = settings.get("denoising_steps")
    if steps is None:
        return
    falling = all(a > b for a, b in zip((1000.001, *steps), (*steps, 0), strict=True))
    if not steps or not falling:
        raise UserError(
            f"denoising_steps is {', '.join(f'{step:g}' for step in steps) or 'empty'}: give "
            "timesteps that fall from at most 1000 to above 0, such as 1000,750,500,250."
        )
    count, sampler = settings.get("num_inference_steps"), settings.get("sampler")
    if count is not None and count != len(steps):
        raise UserError(
            f"num_inference_steps is {count}, but denoising_steps has {len(steps)}: leave one out."
        )
    if sampler is not None and sampler not in solvers.FEW_STEP_SAMPLERS:
        raise UserError(
            f"denoising_steps goes with the samplers {' and '.join(solvers.FEW_STEP_SAMPLERS)}, "
            f"not with {sampler}: choose one of those, or leave the list out."
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
    for name, side, patch in (
        ("height", height, wan.patch_size[1]),
        ("width", width, wan.patch_size[2]),
    ):
        if side % (spatial * patch):
            raise UserError(
                f"{name} is {side}, but it must be divisible by {spatial * patch}: "
                f"choose {max(1, round(side / (spatial * patch))) * spatial * patch}."
            )
    return frames, height // spatial, width // spatial, wan.in_channels


def noise(
    seeds: Sequence[int], shape: tuple[int, ...]
) -> Float[Array, "videos frames height width channels"]:
    """Standard normal latents, float32; each video's from its own seed alone."""
    draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))
    return draw(jnp.asarray(np.asarray(seeds, np.uint32)))


def sampling_network(
    params: dict[str, Any],
    config: WanConfig,
    shape: tuple[int, ...],
    timesteps: Float[np.ndarray, " steps"],
    text: Float[Array, "halves*videos tokens text_dim"],
    lengths: Int[Array, " halves*videos"],
    *,
    mode: Int[Array, " layers"] | None = None,
    r: Float[Array, " layers"] | None = None,
    dtype: Any = jnp.float32,
    layout: Any = None,
) -> tuple[TimeEmbedding, Callable[[Array, TimeEmbedding], tuple[Array, ...]]]:
    """(times, network) of a sampling loop; what no step changes is computed here, once.

    network(x, time) gives the velocities of x `[videos, ...]` of this shape, one for each half of
    the text; both halves pass as one batch. time: a row of `times`, which has one for each step.
    `mode`, `r`, `dtype`, `layout` as the network takes them.
    """
    params = params | {"blocks": cast_products(params["blocks"], dtype)}
    model = bind(WanTransformer, config, params)
    times = model.embed_time(jnp.asarray(timesteps)[:, None])  # for a batch of 1, that is for all
    options = {"dtype": dtype, "layout": layout}
    tokens = video_tokens(config, shape[1:])
    text = model.embed_text(text, lengths, video_tokens=tokens, **options)
    halves = lengths.shape[0] // shape[0]

    def network(x, time):
        u = model(jnp.concatenate([x] * halves), time, text, None, mode=mode, r=r, **options)
        return tuple(jnp.split(u, halves))

    return times, network


@partial(compiled_programs.jit, static_argnames=("config", "sampler", "sigmas", "dtype", "layout"))
def denoise(
    params: dict[str, Any],
    noise: Float[Array, "videos frames height width channels"],
    seeds: UInt32[Array, " videos"],
    text: Float[Array, "halves*videos tokens text_dim"],
    lengths: Int[Array, " halves*videos"],
    guidance_scale: Float[Array, ""],
    mode: Int[Array, " layers"] | None,
    r: Float[Array, " layers"] | None = None,
    *,
    config: WanConfig,
    sampler: str,
    sigmas: tuple[float, ...],
    dtype: Any,
    layout: Any = None,
) -> Float[Array, "videos frames height width channels"]:
    """The whole sampling loop, from noise to latents; the latents stay float32 between the steps.

    `text` holds the prompts and, behind them, the negative prompts: both halves pass the network as
    one batch. With the prompts alone there is no guidance. `r` is of layers whose mode is MIX;
    `layout` as the network takes it. `seeds` are of the noise that the sampler "renoise" adds, each
    video's from its own.
    """
    grid = np.array(sigmas)
    timesteps = grids.network_timesteps(grid, sampler)
    times, network = sampling_network(
        params,
        config,
        noise.shape,
        timesteps,
        text,
        lengths,
        mode=mode,
        r=r,
        dtype=dtype,
        layout=layout,
    )

    def velocity(x, time):
        u, *negative = network(x, time)
        return rectified.guided(u, *negative, guidance_scale) if negative else u

    keys = jax.vmap(jax.random.key)(seeds) if sampler == "renoise" else None
    return solvers.sample(velocity, noise, grid, sampler, times=times, keys=keys)


class Pipeline:
    """A checkpoint ready to sample: all of it loaded, or from `turns.open_folder`.

    Of the latter, one network at a time is on the device, unless they are `resident` (see `Turns`).
    `dtype` is that of the networks' matrix products and of the VAE's decoder; by default float32 on
    a CPU, and bfloat16 on an accelerator: with trained weights that moves a text embedding and a
    velocity by less than 1% (`BFLOAT16_BOUND`), and the decoded video by less than its rounding to
    255 levels (`VAE_PSNR_BOUND` has room for others). `text_folder`:
    where text embeddings are kept for other runs. `placement`: of one host, if the work is shared
    between devices.
    """

    def __init__(
        self,
        checkpoint: Any,
        dtype: Any = None,
        text_folder: Path | None = None,
        placement: Placement | None = None,
        resident: bool = False,
    ):
        self.checkpoint = checkpoint
        self._placement = placement if placement and placement.layout else None
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        self.mode, self.r = None, None
        if checkpoint.linear_layers:
            self.mode = np.full(checkpoint.wan_config.num_layers, SOFTMAX, np.int32)
            self.mode[list(checkpoint.linear_layers)] = LINEAR
        place = self._placement.params if self._placement else jax.device_put
        self._turns = Turns(checkpoint, self.dtype, place, resident)
        self.texts = TextEmbeddings(
            checkpoint.tokenizer,
            checkpoint.umt5_config,
            self.dtype,
            cache(partial(mark, checkpoint, "text_encoder")),
            text_folder,
        )

    @property
    def batch_devices(self) -> int:
        """Between how many devices, or groups of them, a batch of videos is shared."""
        return meshes.batch_devices(self._placement.mesh) if self._placement else 1

    def transformer(self) -> Params:
        """The transformer's parameters, on the device."""
        return self._turns.params("transformer")

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """[frames, height, width, channels] of one video's latents; UserError for a wrong size."""
        size = (settings.height, settings.width, settings.num_frames)
        return latent_shape(self.checkpoint.wan_config, self.checkpoint.vae_config, *size)

    def encode(self, prompts: Sequence[str]) -> None:
        """Makes sure that the embeddings of these prompts are at hand, for `batches`."""
        self.texts.add(prompts, partial(self._turns.params, "text_encoder"))

    def encode_prompts(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "prompts tokens text_dim"], Int[np.ndarray, " prompts"]]:
        """Text embeddings, float32, padded to the bucket of the longest, zero from `lengths` on."""
        self.encode(prompts)
        lengths = np.array([len(self.texts[prompt]) for prompt in prompts], np.int32)
        text = self.texts.padded(prompts, text_bucket(max(lengths)))
        return jnp.asarray(text, jnp.float32), lengths

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
        shape, negative = self.latent_shape(settings), settings.negative_prompt
        sigmas, seeds = settings.sigmas(), np.asarray(seeds, np.uint32)
        guided = settings.guidance_scale > 1
        self.encode([*prompts, negative] if guided else prompts)
        shortest = len(self.texts[negative]) if guided else 0
        buckets = [text_bucket(max(len(self.texts[prompt]), shortest)) for prompt in prompts]
        if pads_are_keys(video_tokens(self.checkpoint.wan_config, shape)):
            buckets = [TEXT_TOKENS] * len(prompts)  # one program for all lengths
        for bucket in sorted(set(buckets)):
            rows = [i for i, b in enumerate(buckets) if b == bucket]
            for first in range(0, len(rows), batch_size):
                real = rows[first : first + batch_size]
                filled = np.array(real + real[-1:] * (batch_size - len(real)))
                texts = [prompts[i] for i in filled] + [negative] * (batch_size * guided)
                latents = denoise(
                    self._turns.params("transformer"),
                    noise(seeds[filled], shape) if start is None else start[filled],
                    jnp.asarray(seeds[filled]),
                    jnp.asarray(self.texts.padded(texts, bucket)),
                    jnp.asarray([len(self.texts[text]) for text in texts], jnp.int32),
                    jnp.float32(settings.guidance_scale),
                    self.mode,
                    self.r,
                    config=self.checkpoint.wan_config,
                    sampler=settings.sampler,
                    sigmas=tuple(sigmas.tolist()),
                    dtype=self.dtype,
                    layout=self._placement and self._placement.layout,
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
        self, latents: Float[Array, "videos frames height width channels"], tiling: bool = False
    ) -> UInt8[np.ndarray, "videos frames height width 3"]:
        """Pixels of the transformer's latents; `tiling`: by tiles, in less memory (`vae_tiles`)."""
        return np.concatenate(list(self.decode_pieces(latents, tiling)), axis=1)

    def decode_pieces(
        self, latents: Float[Array, "videos frames height width channels"], tiling: bool = False
    ) -> Iterator[UInt8[np.ndarray, "videos frames height width 3"]]:
        """`decode`, some frames at a time as they get ready; by tiles all frames at once.

        The VAE is on the device until the last piece is taken.
        """
        config = self.checkpoint.vae_config
        params = self._turns.params("vae")
        latents = denormalize(jnp.asarray(latents), config)
        if self._placement and not tiling:
            latents, params = pictures.placed(latents, params, self._placement.mesh)
        vae = bind(WanVAE, config, params)
        if tiling:
            yield pixels(decode_tiles(vae, latents, dtype=self.dtype))
        else:
            yield from vae.decode_pixels(latents, self.dtype)
