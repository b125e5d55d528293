"""The moving picture of the README: teacher above, student below, each column from one noise.

python benchmarks/picture.py --workdir=runs/digits --out=docs/picture.webp

It shows the first videos that the evaluate stage of WORKDIR has shown, none picked.
"""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.numpy import load_file

from linvideo_jax import command_line, loop, video
from linvideo_jax.errors import UserError
from linvideo_jax.evaluation import STUDENT, TEACHER, file_stem

LIMIT = 2 * 2**20  # bytes
_CELL, _GAP, _MARGIN = 168, 10, 16  # px
_PAPER, _INK, _QUIET = (255, 255, 255), (28, 31, 35), (102, 108, 115)
_LINE = 16  # px, height of a line of a prompt


def draw(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "videos frames height width 3"]]],
    prompts: Sequence[str],
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The rows' videos under their titles, and under each column its prompt."""
    small, large = (ImageFont.load_default(size) for size in (12, 15))
    words = [textwrap.wrap(prompt, 27) for prompt in prompts]
    width = 2 * _MARGIN + len(prompts) * (_CELL + _GAP) - _GAP
    step = _CELL + _GAP + 24
    height = 2 * _MARGIN + len(rows) * step + _LINE * max(map(len, words))
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    left = [_MARGIN + i * (_CELL + _GAP) for i in range(len(prompts))]
    top = [_MARGIN + 24 + i * step for i in range(len(rows))]
    for (title, _), y in zip(rows, top, strict=True):
        pen.text((_MARGIN, y - 22), title, fill=_INK, font=large)
    for x, lines in zip(left, words, strict=True):
        for i, line in enumerate(lines):
            y = _MARGIN + len(rows) * step + i * _LINE
            pen.text((x, y), line, fill=_QUIET, font=small)
    frames = np.repeat(np.asarray(page)[None], rows[0][1].shape[1], 0)
    for (_, videos), y in zip(rows, top, strict=True):
        for x, clip in zip(left, videos, strict=True):
            for i, frame in enumerate(clip):
                cell = Image.fromarray(frame).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
                frames[i, y : y + _CELL, x : x + _CELL] = np.asarray(cell)
    return frames


def program(argv: Sequence[str]) -> None:
    """Writes the picture; UserError if the run lacks a model, or the file would be too large."""
    values = command_line.define(
        {
            "workdir": (None, "folder of a run whose evaluate stage is done"),
            "out": (None, "file to write, .webp or .gif"),
            "student": (None, "a model of the evaluation; default the run's own, or the first"),
        }
    )
    flags.DEFINE_integer("count", 5, "videos in a row", 1, 16, flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "workdir", "out")
    folder, out = Path(given["workdir"]) / "evaluate", Path(given["out"])
    if out.suffix not in (".webp", ".gif"):
        raise UserError(f"--out={out} is no .webp or .gif file: choose one of the two.")
    metrics = loop.read_json(folder / "metrics.json")
    students = [k for k, entry in metrics["contenders"].items() if entry["role"] == "after"]
    name = given["student"] or (STUDENT if STUDENT in students else next(iter(students), None))
    if name not in students:
        raise UserError(
            f"{folder} has no student {name or ''}: evaluate one, or choose from its own "
            f"({', '.join(students) or 'none'})."
        )
    entry = metrics["contenders"][name]
    linear = f"{len(entry['linear_layers'])} of {entry['num_layers']} attention layers linear"
    titles = {TEACHER: "Teacher: softmax attention", name: f"Student: {linear}"}
    count = min(given["count"], len(metrics["shown"]))
    rows = [(title, _frames(folder, one, count)) for one, title in titles.items()]
    prompts = [shown["prompt"] for shown in metrics["shown"][:count]]
    out.parent.mkdir(parents=True, exist_ok=True)
    video.write_animation(out, draw(rows, prompts))
    size = out.stat().st_size
    if size > LIMIT:
        out.unlink()
        raise UserError(f"{out} would be {size / 2**20:.1f} MiB, over 2: lower --count.")
    print(f"{out}: {count} videos of each, {size / 1024:.0f} KiB")


def _frames(folder: Path, name: str, count: int) -> UInt8[np.ndarray, "videos f h w 3"]:
    path = folder / f"{file_stem(name)}-shown.safetensors"
    try:
        frames = load_file(path)["frames"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): run the evaluate stage again.") from None
    if len(frames) < count or not count:
        raise UserError(f"{path} shows {len(frames)} videos: set evaluate.num_shown higher.")
    return frames[:count]


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command starts anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
