"""Makes videos from prompts with a checkpoint of ours, a diffusers folder, or a student's folder.

python sample.py --checkpoint=runs/demo/final --prompts=prompts.txt --out=videos
python sample.py --checkpoint=assets/wan_digits --prompt="a red 3 moves slowly up" --out=videos

A prompt file is text with one prompt a line, or .jsonl with objects that have a prompt and perhaps
a seed, height, width, guidance_scale, negative_prompt or another setting of their own. The videos
have the seeds `--seed`, `--seed` + 1 and so on, and depend on nothing else. Run the same command
again to finish an interrupted run: videos that are there are kept. Several devices share the videos
of a batch; with `--mesh=context:4` four of them share the tokens of each video.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from linvideo_jax import (
    command_line,
    compiled_programs,
    device_memory,
    folders,
    generate,
    pipeline,
    requests,
    text,
    turns,
)
from linvideo_jax.errors import UserError
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.placement import Placement


def define_flags() -> flags.FlagValues:
    """A fresh set for each call of `main`; None stands for the checkpoint's own default."""
    values = command_line.define(
        {
            "checkpoint": (None, "folder of the model"),
            "out": (None, "folder of the videos and of manifest.json"),
            "prompt": (None, "one prompt"),
            "prompts": (None, "text file, one prompt a line, or .jsonl"),
            "negative_prompt": (None, "what guidance leads away from"),
            "sampler": (None, "unipc, euler or dpm++; renoise or euler for distilled models"),
            "time_grid": (None, "diffusers, or original: that of Wan's own code"),
            "mesh": (None, "devices by axis, such as context:4; default data: all of them"),
            "text_cache": (None, f"folder of text embeddings; default {text.default_folder()}"),
        }
    )
    define = {"flag_values": values}
    flags.DEFINE_integer("num_inference_steps", None, "steps of the sampler", **define)
    flags.DEFINE_list(
        "denoising_steps", None, "a distilled model's timesteps before the shift", **define
    )
    flags.DEFINE_float("guidance_scale", None, "1 is none", **define)
    flags.DEFINE_integer("height", None, "pixels", **define)
    flags.DEFINE_integer("width", None, "pixels", **define)
    flags.DEFINE_integer("num_frames", None, "4k + 1, at 16 a second", **define)
    flags.DEFINE_float("flow_shift", None, "more than 1: more of the steps near noise", **define)
    flags.DEFINE_integer("seed", 0, "of the first video; each next one adds 1", **define)
    flags.DEFINE_integer("num_samples", 1, "videos of each prompt", **define)
    flags.DEFINE_bool("vbench_names", False, "name files PROMPT-INDEX.mp4", **define)
    flags.DEFINE_bool("vae_tiling", False, "decode by tiles: less memory, more time", **define)
    flags.DEFINE_bool("resident", False, "keep transformer and VAE on the device", **define)
    flags.DEFINE_integer("batch_size", None, "videos at a time; default at most 4", **define)
    return values


def numbers(name: str, words: Sequence[str] | None) -> tuple[float, ...] | None:
    """The numbers of a list flag; UserError for a word that is none."""
    try:
        return None if words is None else tuple(map(float, words))
    except ValueError:
        raise UserError(
            f"--{name}={','.join(words)} is no list of numbers: write --{name}=1000,750,500,250."
        ) from None


def sample(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, before anything is written."""
    values = define_flags()
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "checkpoint", "out")
    overrides = {name: given[name] for name in pipeline.Settings.__dataclass_fields__}
    overrides["denoising_steps"] = numbers("denoising_steps", given["denoising_steps"])
    pipeline.check_settings(**overrides)
    rows = requests.read_rows(values.prompt, values.prompts)
    for name in ("num_samples", "batch_size"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"{name} is {given[name]}: choose 1 or more.")
    requests.check_seeds(values.seed, len(rows) * values.num_samples)
    sizes = meshes.parse(values.mesh) if values.mesh else {}
    out = Path(values.out)
    folders.check_writable(out, "--out")

    compiled_programs.keep_on_disk()
    device_memory.take_most_of_a_gpu()
    checkpoint = turns.open_folder(values.checkpoint)
    placement = Placement.by_sizes(sizes, checkpoint.wan_config.num_attention_heads)
    cache = Path(values.text_cache) if values.text_cache else text.default_folder()
    model = pipeline.Pipeline(
        checkpoint, text_folder=cache, placement=placement, resident=values.resident
    )
    settings = pipeline.Settings.of(checkpoint, **overrides)
    videos = requests.make_requests(
        rows,
        settings,
        values.seed,
        num_samples=values.num_samples,
        vbench_names=values.vbench_names,
        check=model.latent_shape,
    )
    generate.warn_of_unknown_words(checkpoint.tokenizer, [row.prompt for row in rows])
    files = generate.make_videos(
        model,
        videos,
        settings,
        out,
        batch_size=values.batch_size or generate.default_batch_size(model, videos),
        vae_tiling=values.vae_tiling,
    )
    made = "1 video" if len(files) == 1 else f"{len(files)} videos"
    print(f"{made} in {out}, listed in {out / generate.MANIFEST}")


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(sample, argv, "the same command makes the videos that are missing")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
