"""Converts a checkpoint of PyTorch's world into a folder of ours.

python convert/from_torch.py --source=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out=runs/wan
python convert/from_torch.py --source=Wan2.1-T2V-14B --out=runs/wan14 --dtype=bfloat16

The source is a folder in diffusers' or the original repository's layout, one of their part folders,
a single file, a transformer-only folder with a base, or a Hugging Face name. Several sources,
comma-separated, are put together: --source=transformer.safetensors,vae.pth,umt5.safetensors.
PyTorch is needed for .pth and .pt files alone.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from absl import flags

from convert import hub, importer, sources
from convert.lora import Lora
from convert.sources import Source
from linvideo_jax import checkpoints, command_line
from linvideo_jax.errors import UserError
from linvideo_jax.parts import DTYPES, PARTS

FLAGS = {
    "source": (None, "what to read: folder, file or Hugging Face name; several with commas"),
    "out": (None, "folder to write; a checkpoint that is there is replaced"),
    "dtype": (None, f"{', '.join(DTYPES)}; as stored if not given, float8 as bfloat16"),
    "parts": (None, f"what to convert, of {','.join(PARTS)}; what is there if not given"),
}


def convert(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, and then nothing is written."""
    values = command_line.define(FLAGS)
    flags.DEFINE_multi_string(
        "lora", [], "FILE:STRENGTH, merged into the transformer; repeatable", flag_values=values
    )
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "source", "out")
    dtype = command_line.choice("dtype", given["dtype"], tuple(DTYPES))
    parts = given["parts"].split(",") if given["parts"] else None
    for part in parts or ():
        command_line.choice("parts", part, tuple(PARTS))
    loras = [Lora.parse(text) for text in given["lora"]]

    found = [_find(text, parts) for text in given["source"].split(",")]
    source = found[0] if len(found) == 1 else _joined(found)
    if lacking := [part for part in parts or () if part not in source.parts]:
        raise UserError(f"{source.path} is {source.description} and has no {', '.join(lacking)}.")
    if parts:
        source = replace(source, parts={part: source.parts[part] for part in parts})
    if loras and "transformer" not in source.parts:
        raise UserError("--lora changes the transformer, which is not among the parts.")
    flat = importer.read(source, loras=loras)
    checkpoints.save_flat(
        given["out"],
        config=checkpoints.source_config(source),
        flat=flat,
        tokenizer=source.tokenizer,
        scheduler=source.scheduler,
        dtype=dtype,
        source=given["source"],
        provenance={
            "kind": source.description,
            "loras": [{"file": str(lora.path), "strength": lora.strength} for lora in loras],
            "source_dtypes": {
                part: sorted({str(array.dtype) for array in arrays.values()})
                for part, arrays in flat.items()
            },
        },
        progress=True,
    )
    for part, arrays in flat.items():
        size = sum(array.size for array in arrays.values())
        print(f"{part}: {len(arrays)} arrays, {size:,} parameters")
    lacking = [part for part in PARTS if part not in flat]
    if source.tokenizer is None:
        lacking.append("tokenizer")
    note = f", without {', '.join(lacking)}" if lacking else ""
    print(f"Written to {given['out']}{note}.")


def _find(text: str, parts: Sequence[str] | None) -> Source:
    path = hub.fetch(text, parts or PARTS) if hub.is_name(text) else Path(text)
    complete = path.is_dir() and sources.kind_of(path)
    source = sources.find(path, parts if complete else None)
    print(f"{text} is {source.description}.")
    return source


def _joined(found: Sequence[Source]) -> Source:
    """Several sources as one; UserError if two of them have the same part."""
    parts = {}
    for source in found:
        if twice := parts.keys() & source.parts.keys():
            raise UserError(f"{source.path} has a second {', '.join(sorted(twice))}.")
        parts |= source.parts
    return Source(
        path=Path(",".join(str(source.path) for source in found)),
        description="; ".join(source.description for source in found),
        parts=parts,
        config=next((s.config for s in found if "transformer" in s.parts), found[0].config),
        tokenizer=next((s.tokenizer for s in found if s.tokenizer), None),
        scheduler=next((s.scheduler for s in found if s.scheduler), None),
        feature_maps=next((s.feature_maps for s in found if s.feature_maps), None),
    )


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(convert, argv, "nothing was written; give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
