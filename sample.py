"""Makes videos from prompts with a checkpoint of ours, a diffusers folder, or a student's folder.

python sample.py --checkpoint=runs/demo/final --prompts=prompts.txt --out=videos
python sample.py --checkpoint=assets/wan_digits --prompt="a red 3 moves slowly up" --out=videos

The video of the i-th prompt has seed `--seed` + i and depends on nothing else. Run the same command
again to finish an interrupted run: videos that are there are kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from linvideo_jax import checkpoints, command_line, folders, generate, pipeline
from linvideo_jax.errors import UserError


def define_flags() -> flags.FlagValues:
    """A fresh set for each call of `main`; None stands for the checkpoint's own default."""
    values = command_line.define(
        {
            "checkpoint": (None, "folder of the model"),
            "out": (None, "folder of the videos and of manifest.json"),
            "prompt": (None, "one prompt"),
            "prompts": (None, "text file, one prompt a line"),
            "negative_prompt": ("", "what guidance leads away from"),
            "sampler": (None, "unipc or euler"),
        }
    )
    define = {"flag_values": values}
    flags.DEFINE_integer("num_inference_steps", None, "steps of the sampler", **define)
    flags.DEFINE_float("guidance_scale", None, "1 is none", **define)
    flags.DEFINE_integer("height", None, "pixels", **define)
    flags.DEFINE_integer("width", None, "pixels", **define)
    flags.DEFINE_integer("num_frames", None, "4k + 1, at 16 a second", **define)
    flags.DEFINE_float("flow_shift", None, "more than 1: more of the steps near noise", **define)
    flags.DEFINE_integer("seed", 0, "of the first prompt; each next one adds 1", **define)
    flags.DEFINE_integer("batch_size", None, "videos at a time; default at most 4", **define)
    return values


def sample(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, before anything is written."""
    values = define_flags()
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "checkpoint", "out")
    overrides = {name: given[name] for name in pipeline.Settings.__dataclass_fields__}
    pipeline.check_settings(**overrides)
    prompts = generate.choose_prompts(values.prompt, values.prompts)
    generate.check_seeds(values.seed, len(prompts))
    batch_size = values.batch_size
    if batch_size is None:
        batch_size = generate.even_batch_size(len(prompts))
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: choose 1 or more.")
    out = Path(values.out)
    folders.check_writable(out, "--out")

    checkpoint = checkpoints.load(values.checkpoint)
    settings = pipeline.Settings.of(checkpoint, **overrides)
    generate.warn_of_unknown_words(checkpoint.tokenizer, prompts)
    model = pipeline.Pipeline(checkpoint)
    files = generate.make_videos(model, prompts, values.seed, settings, batch_size, out)
    print(f"{len(files)} videos in {out}, listed in {out / generate.MANIFEST}")


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(sample, argv, "the same command makes the videos that are missing")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
