"""Converts a checkpoint of ours into what PyTorch's programs load.

python convert/to_torch.py --checkpoint=runs/pretrain/final --out=exported --layout=diffusers
python convert/to_torch.py --checkpoint=runs/wan --out=exported --layout=original
python convert/to_torch.py --checkpoint=runs/digits/final --out=student --layout=linvideo \\
    --base=exported

diffusers: the whole pipeline for WanPipeline.from_pretrained. original: what the original Wan2.1
repository loads; it needs PyTorch, the others do not. linvideo: the transformer alone, with the
feature maps of its linear layers; the other parts stay in the folder --base.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert import exporter, exporter_original
from linvideo_jax import checkpoints, command_line, folders
from linvideo_jax.errors import UserError
from linvideo_jax.parts import DTYPES, PARTS, cast

LAYOUTS = ("diffusers", "original", "linvideo")
FLAGS = {
    "checkpoint": (None, "folder to read"),
    "out": (None, "folder to write: a new or an empty one"),
    "layout": ("diffusers", f"one of {', '.join(LAYOUTS)}"),
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

    parts = ("transformer",) if layout == "linvideo" else tuple(PARTS)
    config, flat, tokenizer, scheduler = checkpoints.read_flat(given["checkpoint"], parts)
    if config["feature_map"] not in (None, "hedgehog"):
        raise UserError(
            f"{given['checkpoint']} has the feature map {config['feature_map']!r}, which exists "
            "for ablations and has no PyTorch processor: export a hedgehog student."
        )
    manifest = checkpoints.read_manifest(given["checkpoint"])
    flat = {part: cast(arrays, dtype) for part, arrays in flat.items()}
    out = Path(given["out"])
    if layout != "linvideo" and tokenizer is None:
        raise UserError(f"{given['checkpoint']} has no tokenizer, which the layout needs.")
    size = sum(array.nbytes for arrays in flat.values() for array in arrays.values())
    folders.check_space(out, size)
    if layout == "diffusers":
        exporter.write_diffusers(out, config, manifest, flat, tokenizer, scheduler)
    elif layout == "original":
        exporter_original.write_original(out, config, manifest, flat, tokenizer)
    else:
        base = Path(given["base"])
        exporter.write_transformer(out, config, manifest, flat["transformer"], base)
    print(f"Written to {out}.")


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(convert, argv, "nothing was written; give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
