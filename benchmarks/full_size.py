"""Real Wan2.1's sizes end to end on one GPU, with random weights.

python benchmarks/full_size.py --folder=/dev/shm/wan --out=runs/full_size.json
JAX_PLATFORMS=cpu python benchmarks/full_size.py --small --folder=runs/small --out=runs/small.json

Parts, each in a process of its own, measured once and written to --out at once:

convert   1.3B with umt5-xxl and VAE in diffusers' and in the original layout (needs PyTorch), each
          imported, seconds and peak host memory; what the second leaves is sampled from
sample    81 frames of 480 x 832 in 2 steps with guidance, prompt to mp4 (needs PyAV), each stage's
          seconds and peak GPU memory, twice: with compilation, and warm
vae       81 frames of 720 x 1280 decoded by tiles and whole, and in float32; peaks, differences
parity    one forward of 1.3B at 480p, ours and diffusers' in bfloat16, against diffusers' in
          float32 (needs PyTorch and diffusers)
large     14B, or --blocks of its 40: converted, and two steps at 720p

The folder needs 30 GB for 1.3B and 1.5 GB for each block of 14B; in memory (/dev/shm) it is quick.
`--small` runs everything with tiny networks.
"""

import gc
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import contenders, convert_memory, measure, random_checkpoint
from linvideo_jax import (
    checkpoints,
    command_line,
    compiled_programs,
    folders,
    parts,
    pipeline,
    turns,
)
from linvideo_jax.metrics import likeness
from linvideo_jax.models import module, registry
from linvideo_jax.models.registry import ModelSizes
from linvideo_jax.models.vae import WanVAE, pixels
from linvideo_jax.models.vae_tiles import decode_tiles
from linvideo_jax.models.wan import TEXT_TOKENS, WanTransformer

FLAGS = {
    "folder": (None, "where the checkpoints and the video are"),
    "out": (None, "JSON file of the results"),
    "parts": ("convert,sample,vae,parity,large", "what to measure"),
    "layouts": ("diffusers,original", "what the part convert imports"),
}
PROMPT = "a red 3 moves slowly straight right on a green background"
LAYOUTS = ("diffusers", "original")
MEMORY_GOAL, VAE_GOAL, PARITY_GOAL = 12 * measure.GIB, 12 * measure.GIB, 1.5


class Scale(NamedTuple):
    """Sizes of everything: 480p of the first model, 720p of the second; [height, width, frames]."""

    model: ModelSizes
    large: ModelSizes
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    tile: tuple[int, int]
    dtype: Any


def scale(small: bool, blocks: int | None) -> Scale:
    """True sizes, or tiny ones."""
    if small:
        digits = registry.wan_digits()
        digits = replace(digits, transformer=replace(digits.transformer, num_layers=2))
        return Scale(digits, digits, (64, 96, 5), (96, 128, 5), (8, 4), jnp.bfloat16)
    large = registry.wan2_1_t2v_14b()
    if blocks:
        large = replace(large, transformer=replace(large.transformer, num_layers=blocks))
    first = registry.wan2_1_t2v_1_3b()
    return Scale(first, large, (480, 832, 81), (720, 1280, 81), (64, 16), jnp.bfloat16)


def converted(folder: Path, sizes: ModelSizes, layout: str, names: Sequence[str]) -> dict[str, Any]:
    """Makes a random checkpoint, imports it into `folder/ours`, and checks some of its arrays."""
    source, ours = folder / "source", folder / "ours"
    shutil.rmtree(source, ignore_errors=True)
    start = time.perf_counter()
    size = random_checkpoint.write(source, sizes, layout=layout, parts=names)
    made = time.perf_counter() - start
    words = [f"--source={source}", f"--out={ours}", f"--parts={','.join(names)}"]
    figures = convert_memory.watched(["convert/from_torch.py", *words])
    shutil.rmtree(source)
    random_checkpoint.check(ours, sizes, names, "bfloat16")
    return {"bytes": size, "made_seconds": made, **figures}


def convert_part(sizes: Scale, folder: Path, layouts: Sequence[str] = LAYOUTS) -> dict[str, Any]:
    """Both layouts, or those given."""
    names = tuple(parts.PARTS)
    return {layout: converted(folder, sizes.model, layout, names) for layout in layouts}


def sample_part(sizes: Scale, folder: Path) -> dict[str, Any]:
    """Prompt to mp4, the networks taking turns as in sample.py."""
    height, width, frames = sizes.low
    checkpoint = turns.open_folder(folder / "ours")
    settings = pipeline.Settings.of(
        checkpoint,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=2,
        guidance_scale=5.0,
        flow_shift=3.0,
        negative_prompt=registry.WAN_NEGATIVE_PROMPT,
    )
    figures = {}
    parameters = pipeline.Pipeline(checkpoint, sizes.dtype)
    for name in ("first", "warm"):
        # One pipeline, so that the transformer's second turn is from the host's memory; other
        # words, so that the text encoder is needed again.
        prompts = [f"{PROMPT} {name}"]
        figures[name] = _stages(parameters, prompts, settings, folder / f"{name}.mp4")
    peak = max(stage["peak_bytes"] for run in figures.values() for stage in run.values())
    figures |= {"peak_bytes": peak, "peak_within_goal": measure.within(peak, MEMORY_GOAL)}
    from linvideo_jax import video

    made = video.read_mp4(folder / "warm.mp4")
    assert made.shape == (frames, height, width, 3), made.shape
    return figures | {"video": list(made.shape)}


def _stages(model: pipeline.Pipeline, prompts, settings, path: Path) -> dict[str, Any]:
    from linvideo_jax import video

    stages, networks = measure.Stage(), model._turns
    with stages("read text encoder"):
        jax.block_until_ready(networks.params("text_encoder"))
    with stages("text encoder"):
        model.encode([*prompts, settings.negative_prompt])
    with stages("read transformer"):
        jax.block_until_ready(networks.params("transformer"))
    with stages("transformer, 2 steps"):
        latents = model.latents(prompts, [0], settings, 1)
    assert np.isfinite(latents).all()
    with stages("read VAE"):
        jax.block_until_ready(networks.params("vae"))
    with stages("VAE"):
        (clip,) = model.decode(latents)
    with stages("mp4"):
        video.write_mp4(path, clip)
    return stages.figures


def vae_part(sizes: Scale, folder: Path) -> dict[str, Any]:
    """As the pipeline decodes, whole and by tiles, and once in float32, which differs from both."""
    height, width, frames = sizes.high
    config, stages = sizes.model.vae, measure.Stage()
    flat = random_checkpoint.random_flat("vae", config, "float32")
    vae = module.bind(WanVAE, config, parts.unflatten("vae", config, flat, jnp.float32))
    shape = pipeline.latent_shape(sizes.model.transformer, config, height, width, frames)
    latents = jax.random.normal(jax.random.key(0), (1, *shape))
    made = {}

    def whole(dtype) -> np.ndarray:
        return np.concatenate(list(vae.decode_pixels(latents, dtype)), axis=1)

    # The least memory first: so its peak is read off exactly.
    for name, decode in (
        ("tiles", lambda: pixels(decode_tiles(vae, latents, *sizes.tile, sizes.dtype))),
        ("whole", lambda: whole(sizes.dtype)),
    ):
        for when in ("first", "warm"):
            with stages(f"{name}, {when}"):
                made[name] = decode()
    with stages("float32, first"):
        made["float32"] = whole(jnp.float32)
    figures: dict[str, Any] = {"stages": stages.figures}
    made = {name: clip.astype(np.float32) for name, clip in made.items()}
    figures["tiles_largest_difference_of_255"] = float(np.abs(made["tiles"] - made["whole"]).max())
    figures["whole_psnr_db"] = likeness.psnr(made["whole"], made["float32"])
    peak = stages.figures["whole, warm"]["peak_bytes"]
    return figures | {"whole_within_goal": measure.within(peak, VAE_GOAL)}


def parity_part(sizes: Scale, folder: Path) -> dict[str, Any]:
    """diffusers first, in float32 and as it is loaded for bfloat16; then ours."""
    import diffusers
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    config, random = sizes.model.transformer, np.random.default_rng(0)
    shape = pipeline.latent_shape(config, sizes.model.vae, *sizes.low)
    latents = random.normal(size=(1, *shape)).astype(np.float32)
    length = 120
    text = np.zeros((1, TEXT_TOKENS, config.text_dim), np.float32)
    text[:, :length] = random.normal(size=(1, length, config.text_dim))
    timestep = np.array([700.0], np.float32)
    source = folder / "parity"
    shutil.rmtree(source, ignore_errors=True)
    random_checkpoint.write(source, sizes.model, layout="diffusers", parts=("transformer",))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = diffusers.WanTransformer3DModel.from_pretrained(
            source, subfolder="transformer", torch_dtype=dtype
        ).to(device)
        with torch.no_grad():
            states = torch.from_numpy(latents).permute(0, 4, 1, 2, 3).to(device, dtype)
            words = torch.from_numpy(text).to(device, dtype)
            out = model(states, torch.from_numpy(timestep).to(device), words).sample
        theirs[name] = out.permute(0, 2, 3, 4, 1).float().cpu().numpy()
        del model, states, words, out
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    shutil.rmtree(source)
    flat = random_checkpoint.random_flat("transformer", config, "bfloat16")
    params = parts.unflatten("transformer", config, flat, jnp.float32, products=sizes.dtype)

    @compiled_programs.jit  # with the options that sampling has
    def velocity(params, *inputs):
        return module.bind(WanTransformer, config, params)(*inputs, dtype=sizes.dtype)

    ours = velocity(params, latents, timestep, text[:, : length + 40], jnp.array([length]))
    figures = {
        "tokens": int(np.prod(shape[:3]) // np.prod(config.patch_size)),
        "our_error": measure.relative_error(ours, theirs["float32"]),
        "diffusers_error": measure.relative_error(theirs["bfloat16"], theirs["float32"]),
        "ours_to_diffusers_bfloat16": measure.relative_error(ours, theirs["bfloat16"]),
    }
    ratio = figures["our_error"] / figures["diffusers_error"]
    return figures | {"ratio": ratio, "ratio_within_goal": ratio <= PARITY_GOAL}


def large_part(sizes: Scale, folder: Path) -> dict[str, Any]:
    """The transformer alone; the text is random."""
    config, place = sizes.large.transformer, folder / "large"
    place.mkdir(parents=True, exist_ok=True)
    figures = {
        "blocks": config.num_layers,
        "convert": converted(place, sizes.large, "diffusers", ("transformer",)),
    }
    stages = measure.Stage()
    with stages("read transformer"):
        flat = checkpoints.read_flat(place / "ours", ("transformer",))[1]["transformer"]
        params = parts.unflatten("transformer", config, flat, jnp.float32, products=sizes.dtype)
        jax.block_until_ready(params)
    shutil.rmtree(place)
    shape = pipeline.latent_shape(config, sizes.large.vae, *sizes.high)
    inputs, options = contenders.sampling_loop(config, params, shape, (60, 130), 2, sizes.dtype)
    for name in ("first", "warm"):
        with stages(f"2 steps with guidance, {name}"):
            latents = pipeline.denoise(*inputs, **options)
            finite = bool(jnp.isfinite(latents).all())
    assert finite
    return figures | {"tokens": int(np.prod(shape[:3])) // 4, "stages": stages.figures}


PARTS = {
    "convert": convert_part,
    "sample": sample_part,
    "vae": vae_part,
    "parity": parity_part,
    "large": large_part,
}


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(FLAGS)
    flags.DEFINE_bool("small", False, "tiny networks, on any machine", flag_values=values)
    flags.DEFINE_integer("blocks", None, "of 14B's 40, if memory or time is short", 1, 40,
                         flag_values=values)  # fmt: skip
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "folder", "out")
    folder = Path(given["folder"])
    folders.check_writable(folder, "--folder")
    results = measure.Results(Path(given["out"]), values.small)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = scale(values.small, values.blocks)
    layouts = given["layouts"].split(",")
    for layout in layouts:
        command_line.choice("layouts", layout, LAYOUTS)
    known = {name: partial(part, sizes, folder) for name, part in PARTS.items()}
    known["convert"] = partial(convert_part, sizes, folder, layouts)
    measure.run_parts(known, given["parts"].split(","), results, measure.command(__file__, argv))


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on with the parts that lack")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
