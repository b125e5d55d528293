"""Converts a checkpoint of ours into what PyTorch's diffusers loads; PyTorch is not needed.

python convert/to_torch.py --checkpoint=runs/pretrain/final --out=exported --layout=diffusers
python convert/to_torch.py --checkpoint=runs/digits/final --out=student --layout=linvideo \\
    --base=exported

diffusers: the whole pipeline for WanPipeline.from_pretrained. linvideo: the transformer alone, with
the feature maps of its linear layers; the other parts stay in the folder --base.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert import exporter
from linvideo_jax import checkpoints, command_line
from linvideo_jax.errors import UserError
from linvideo_jax.parts import DTYPES, PARTS, cast

LAYOUTS = ("diffusers", "linvideo")
FLAGS = {
    "checkpoint": (None, "folder to read"),
    "out": (None, "folder to write: a new or an empty one"),
    "layout": ("diffusers", " or ".join(LAYOUTS)),
    "dtype": (None, f"{', '.join(DTYPES)}; as stored if not given"),
    "base": (None, "with --layout=linvideo: folder in diffusers' layout with the other parts"),
}


def convert(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, and then nothing is written."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "checkpoint", "out", "layout")
    layout = command_line.choice("layout", given["layout"], LAYOUTS)
    dtype = command_line.choice("dtype", given["dtype"], tuple(DTYPES))
    if layout == "linvideo":
        command_line.required(given, "base")
    elif given["base"]:
        raise UserError("--base goes with --layout=linvideo only; leave it out.")

    parts = tuple(PARTS) if layout == "diffusers" else ("transformer",)
    config, flat, tokenizer, scheduler = checkpoints.read_flat(given["checkpoint"], parts)
    flat = {part: cast(arrays, dtype) for part, arrays in flat.items()}
    out = Path(given["out"])
    if layout == "diffusers":
        if tokenizer is None:
            raise UserError(f"{given['checkpoint']} has no tokenizer: diffusers' layout needs one.")
        exporter.write_diffusers(out, config, flat, tokenizer, scheduler)
    else:
        exporter.write_transformer(out, config, flat["transformer"], Path(given["base"]))
    print(f"Written to {out}.")


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(convert, argv, "nothing was written; give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
