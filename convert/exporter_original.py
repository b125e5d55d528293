"""Writes a folder in the layout of the original Wan2.1 repository; PyTorch is needed for it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import original, pickles, tensors
from convert.exporter import has_maps, torch_arrays, write_extras, write_maps
from convert.sources import ORIGINAL_T5, ORIGINAL_TOKENIZER, ORIGINAL_VAE, STEMS
from convert.tensors import write_json
from linvideo_jax import folders
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray
from linvideo_jax.parts import Flat

# The length to which the original pads texts.
TEXT_LENGTH = 512

_FILES = {"vae": ORIGINAL_VAE, "text_encoder": ORIGINAL_T5}


def write_original(
    folder: Path,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    flat: Mapping[str, Flat],
    tokenizer: Path,
) -> None:
    """What the original's generate.py loads, and what is ours beside it.

    config, manifest, flat: of a checkpoint, all parts. UserError if PyTorch is not installed, the
    model has sizes that the original does not know, or `folder` cannot be written.
    """
    pickles.import_torch(Path(ORIGINAL_VAE))
    if tuple(config["vae"]["dim_mult"]) != (1, 2, 4, 4):
        raise UserError("the VAE has other levels than Wan2.1's: the original cannot load it.")
    with folders.replaced(folder) as new:
        arrays = torch_arrays("transformer", flat["transformer"])
        write_maps(new, arrays)
        renamed = _renamed("transformer", arrays, config)
        tensors.write(new / f"{STEMS['transformer']}.safetensors", renamed)
        write_json(new / "config.json", _config(config))
        for part, name in _FILES.items():
            pickles.write(new / name, _renamed(part, torch_arrays(part, flat[part]), config))
        shutil.copytree(tokenizer, new / ORIGINAL_TOKENIZER)
        write_extras(new, config, manifest, "original", has_maps(flat["transformer"]))


def _renamed(
    part: str, arrays: Mapping[str, LazyArray], config: Mapping[str, Any]
) -> dict[str, LazyArray]:
    rules = original.names(part, config["vae"]["num_res_blocks"])
    theirs = original.rename(rules, arrays, to_original=True)
    return {theirs[key]: array for key, array in arrays.items()}


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = config["transformer"]
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "eps": sizes["eps"],
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": "t2v",
        "num_heads": sizes["num_attention_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": TEXT_LENGTH,
    }
