"""Converts a checkpoint of PyTorch's world into a folder of ours; PyTorch is not needed.

python convert/from_torch.py --source=assets/wan_digits --out=runs/wan_digits

The source is a folder in diffusers' layout, or a transformer-only folder with a base.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert import importer
from linvideo_jax import checkpoints, command_line
from linvideo_jax.parts import DTYPES, PARTS

FLAGS = {
    "source": (None, "folder to read"),
    "out": (None, "folder to write; a checkpoint that is there is replaced"),
    "dtype": (None, f"{', '.join(DTYPES)}; as stored if not given"),
    "parts": (",".join(PARTS), "what to convert"),
}
KINDS = {"diffusers": "a folder in diffusers' layout", "transformer": "a transformer-only folder"}


def convert(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, and then nothing is written."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "source", "out", "parts")
    dtype = command_line.choice("dtype", given["dtype"], tuple(DTYPES))
    parts = given["parts"].split(",")
    for part in parts:
        command_line.choice("parts", part, tuple(PARTS))

    source = importer.find(given["source"], parts)
    print(f"{source.path} is {KINDS[source.kind]}.")
    flat = importer.read(source)
    checkpoints.save_flat(
        given["out"],
        config=checkpoints.source_config(source),
        flat=flat,
        tokenizer=source.tokenizer,
        scheduler=source.scheduler,
        dtype=dtype,
        source=str(source.path),
    )
    for part, arrays in flat.items():
        size = sum(array.size for array in arrays.values())
        print(f"{part}: {len(arrays)} arrays, {size:,} parameters")
    print(f"Written to {given['out']}.")


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(convert, argv, "nothing was written; give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
