"""Writes folders that PyTorch's diffusers loads, without PyTorch."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import model_card, tensors
from convert.keys import Entry, torch_entries
from convert.sources import CLASSES, FEATURE_MAPS, SAMPLING, STEMS, kind_of
from convert.tensors import write_json
from linvideo_jax import folders
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray
from linvideo_jax.parts import FEATURE_MAP, Flat
from linvideo_jax.progress import Progress

# The first version whose WanPipeline and configurations are those written here.
DIFFUSERS_VERSION = "0.36.0"

PROCESSOR = "linvideo_processor.py"

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
    manifest: Mapping[str, Any],
    flat: Mapping[str, Flat],
    tokenizer: Path,
    scheduler: Mapping[str, Any],
) -> None:
    """Everything that WanPipeline.from_pretrained takes, and config.json with what is ours.

    config, manifest, flat: as of a checkpoint, all parts. A model with linear layers has
    linvideo.safetensors too, which diffusers does not read. UserError if `folder` is not empty or
    cannot be written.
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
        write_json(
            new / "scheduler" / "scheduler_config.json", {**scheduler, shift: config["flow_shift"]}
        )
        write_json(new / "model_index.json", index)
        write_json(new / "config.json", _settings(config))
        write_extras(new, config, manifest, "diffusers", has_maps(flat["transformer"]))


def write_transformer(
    folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], flat: Flat, base: Path
) -> None:
    """A transformer-only folder whose other parts are in `base`, a folder in diffusers' layout.

    The path of `base` is stored relative to `folder`. UserError as in `write_diffusers`.
    """
    if kind_of(base) != "diffusers":
        raise UserError(f"{base} is not a folder in diffusers' layout: it cannot be the base.")
    with folders.replaced(folder) as new:
        _write_part(new, "transformer", config, flat)
        relative = Path(os.path.relpath(base.resolve(), folder.resolve())).as_posix()
        write_json(new / "config.json", {"base": relative, **_settings(config)})
        write_extras(new, config, manifest, "linvideo", has_maps(flat))


def has_maps(flat: Flat) -> bool:
    """Whether a transformer has feature maps, that is linear layers."""
    return any(FEATURE_MAP in name for name in flat)


def write_extras(
    new: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], layout: str, linear: bool
) -> None:
    """The model card, and for a model with linear layers the processor that computes them."""
    (new / "README.md").write_text(model_card.text(config, manifest, layout), encoding="utf-8")
    if linear:
        shutil.copy(Path(__file__).with_name(PROCESSOR), new / PROCESSOR)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("linear_layers", "feature_map", *SAMPLING)
    return {key: config[key] for key in keys if key in config}


def write_maps(new: Path, arrays: dict[str, LazyArray]) -> None:
    """Moves the feature maps out of `arrays` into linvideo.safetensors, if there are any."""
    maps = {key: arrays.pop(key) for key in list(arrays) if FEATURE_MAP in key}
    if maps:
        tensors.write(new / f"{FEATURE_MAPS}.safetensors", maps)


def _write_part(new: Path, part: str, config: Mapping[str, Any], flat: Flat) -> None:
    torch = torch_arrays(part, flat)
    write_maps(new, torch)
    folder = new / part
    folder.mkdir()
    with Progress(part, sum(a.nbytes for a in torch.values()), unit="B") as progress:
        tensors.write(folder / f"{STEMS[part]}.safetensors", torch, progress.add)
    if part == "text_encoder":
        extra = {**TEXT_ENCODER, "dtype": str(flat["shared.embedding"].dtype)}
    else:
        extra = {"_class_name": CLASSES[part], "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / "config.json", {**extra, **config[part]})


def torch_arrays(part: str, flat: Flat) -> dict[str, LazyArray]:
    """Our arrays under diffusers' keys and in PyTorch's layout, each made when it is read."""

    def lazy(entry: Entry) -> LazyArray:
        array = flat[entry.ours]
        return LazyArray(
            entry.shape, array.dtype, lambda: entry.transform.to_torch(np.asarray(array))
        )

    entries = torch_entries(part, {name: array.shape for name, array in flat.items()})
    return {key: lazy(entry) for key, entry in entries.items()}


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    name = tensors.read_json(path).get("tokenizer_class") if path.exists() else None
    return name or "T5TokenizerFast"
