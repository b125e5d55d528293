"""Writes folders that PyTorch's diffusers loads, without PyTorch."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import tensors
from convert.importer import CLASSES, FEATURE_MAPS, SAMPLING, STEMS, kind_of
from convert.keys import torch_entries
from linvideo_jax import folders
from linvideo_jax.errors import UserError
from linvideo_jax.parts import FEATURE_MAP, Flat

# The first version whose WanPipeline and configurations are those written here.
DIFFUSERS_VERSION = "0.36.0"

LIBRARIES = {"transformer": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}

# transformers' UMT5Config needs these beside the sizes; they are those of umt5-xxl.
TEXT_ENCODER = {
    "architectures": [CLASSES["text_encoder"]],
    "model_type": "umt5",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def write_diffusers(
    folder: Path,
    config: Mapping[str, Any],
    flat: Mapping[str, Flat],
    tokenizer: Path,
    scheduler: Mapping[str, Any],
) -> None:
    """Everything that WanPipeline.from_pretrained takes, and config.json with what is ours.

    config, flat: as of a checkpoint, all parts. A model with linear layers has linvideo.safetensors
    too, which diffusers does not read. UserError if `folder` is not empty or cannot be written.
    """
    name = scheduler["_class_name"]
    shift = "flow_shift" if "flow_shift" in scheduler or name.startswith("UniPC") else "shift"
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", name],
        "tokenizer": ["transformers", _tokenizer_class(tokenizer)],
        "transformer_2": [None, None],
        **{part: [LIBRARIES[part], CLASSES[part]] for part in flat},
    }
    with folders.replaced(folder) as new:
        for part, arrays in flat.items():
            _write_part(new, part, config, arrays)
        shutil.copytree(tokenizer, new / "tokenizer")
        (new / "scheduler").mkdir()
        _write_json(
            new / "scheduler" / "scheduler_config.json", {**scheduler, shift: config["flow_shift"]}
        )
        _write_json(new / "model_index.json", index)
        _write_json(new / "config.json", _settings(config))


def write_transformer(folder: Path, config: Mapping[str, Any], flat: Flat, base: Path) -> None:
    """A transformer-only folder whose other parts are in `base`, a folder in diffusers' layout.

    The path of `base` is stored relative to `folder`. UserError as in `write_diffusers`.
    """
    if kind_of(base) != "diffusers":
        raise UserError(f"{base} is not a folder in diffusers' layout: it cannot be the base.")
    with folders.replaced(folder) as new:
        _write_part(new, "transformer", config, flat)
        relative = Path(os.path.relpath(base.resolve(), folder.resolve())).as_posix()
        _write_json(new / "config.json", {"base": relative, **_settings(config)})


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("linear_layers", "feature_map", *SAMPLING)
    return {key: config[key] for key in keys if key in config}


def _write_part(new: Path, part: str, config: Mapping[str, Any], flat: Flat) -> None:
    entries = torch_entries(part, {name: array.shape for name, array in flat.items()})
    torch = {key: entry.transform.to_torch(flat[entry.ours]) for key, entry in entries.items()}
    maps = {key: torch.pop(key) for key in list(torch) if FEATURE_MAP in key}
    folder = new / part
    folder.mkdir()
    tensors.write(folder / f"{STEMS[part]}.safetensors", torch)
    if maps:
        tensors.write(new / f"{FEATURE_MAPS}.safetensors", maps)
    if part == "text_encoder":
        extra = {**TEXT_ENCODER, "dtype": str(flat["shared.embedding"].dtype)}
    else:
        extra = {"_class_name": CLASSES[part], "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(folder / "config.json", {**extra, **config[part]})


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    name = tensors.read_json(path).get("tokenizer_class") if path.exists() else None
    return name or "T5TokenizerFast"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
