"""Checkpoints of true size with random values, written as fast as the disk takes them.

Speed and memory do not depend on the values, which are normal with the scale of an initial model,
so that a network runs through them without overflow. They repeat after 2^24 numbers.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convert import exporter, exporter_original
from linvideo_jax import checkpoints
from linvideo_jax.lazy import LazyArray
from linvideo_jax.models.registry import ModelSizes
from linvideo_jax.parts import DTYPES, FEATURE_MAP, PARTS, Flat, flat_shapes

BLOCK = 1 << 24
LAYOUTS = ("ours", "diffusers", "original")
# A tokenizer of whole words: text has the model's true number of tokens, not its own words.
TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "wan_digits" / "tokenizer"


def random_flat(part: str, config: Any, dtype: str, linear_layers: Sequence[int] = ()) -> Flat:
    """Every parameter of a part under its flat name, made when it is read, the same each time."""
    block = _block(dtype)
    linear = {str(layer) for layer in linear_layers}
    return {
        name: LazyArray(
            shape, block.dtype, lambda name=name, shape=shape: _values(name, shape, block)
        )
        for name, shape in flat_shapes(part, config).items()
        if FEATURE_MAP not in name or name.split(".")[1] in linear
    }


@cache
def _block(dtype: str) -> np.ndarray:
    """Standard normal numbers; none so small that a power of two would take it to zero."""
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    block[np.abs(block) < 2**-6] = 2**-6
    return block.astype(DTYPES[dtype])


def _values(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    if name.endswith(".scale"):
        return np.ones(shape, block.dtype)
    flat, start = np.empty(prod(shape), block.dtype), zlib.crc32(name.encode()) % BLOCK
    for first in range(0, flat.size, BLOCK):
        piece = flat[first : first + BLOCK]
        head = min(BLOCK - start, piece.size)
        piece[:head], piece[head:] = block[start : start + head], block[: piece.size - head]
    return _times_power_of_two(flat, _exponent(name, shape)).reshape(shape)


def _exponent(name: str, shape: tuple[int, ...]) -> int:
    """Of two, near the standard deviation with which such a parameter starts."""
    if name.endswith(".bias"):
        return -6
    if name.endswith("scale_shift_table") or "relative_attention_bias" in name:
        return -5
    if name == "shared.embedding":
        return 0
    fan_in = prod(shape[:-1])
    if ".attention.q." in name:  # T5's logits are not scaled by its head's size
        fan_in *= 64
    return round(-np.log2(fan_in) / 2)


def _times_power_of_two(array: np.ndarray, exponent: int) -> np.ndarray:
    """In place, on the bits: 20 times as fast as a product of bfloat16 numbers."""
    mantissa = {"float32": 23, "bfloat16": 7, "float16": 10}[str(array.dtype)]
    bits = array.view({4: np.int32, 2: np.int16}[array.itemsize])
    bits += bits.dtype.type(exponent << mantissa)
    return array


def write(
    folder: Path,
    sizes: ModelSizes,
    *,
    layout: str,
    parts: Sequence[str] = tuple(PARTS),
    dtype: str = "bfloat16",
    linear_layers: Sequence[int] = (),
    sampling: Mapping[str, Any] = {},
) -> int:
    """A checkpoint in one of LAYOUTS; how many bytes its parameters have.

    diffusers: the transformer alone as a folder with a base, or all parts; original: all parts.
    """
    if linear_layers:
        transformer = replace(sizes.transformer, feature_map="hedgehog")
        sizes = replace(sizes, transformer=transformer)
    models = {part: getattr(sizes, part) for part in parts}
    flat = {part: random_flat(part, models[part], dtype, linear_layers) for part in parts}
    config = checkpoints.make_config(**models, linear_layers=linear_layers, sampling=sampling)
    manifest = {"source": "random values"}
    scheduler = checkpoints.default_scheduler(config["flow_shift"])
    if layout == "ours":
        checkpoints.save_flat(
            folder,
            config=config,
            flat=flat,
            tokenizer=TOKENIZER,
            source=manifest["source"],
            progress=True,
        )
    elif layout == "original":
        exporter_original.write_original(folder, config, manifest, flat, TOKENIZER)
    elif tuple(parts) == ("transformer",):
        base = TOKENIZER.parent
        exporter.write_transformer(folder, config, manifest, flat["transformer"], base)
    else:
        exporter.write_diffusers(folder, config, manifest, flat, TOKENIZER, scheduler)
    return sum(array.nbytes for arrays in flat.values() for array in arrays.values())


def check(folder: Path, sizes: ModelSizes, parts: Sequence[str], dtype: str) -> None:
    """AssertionError unless some arrays of each part are bit for bit those that `write` made."""
    for part in parts:
        wanted = random_flat(part, getattr(sizes, part), dtype)
        stored = checkpoints.read_flat(folder, (part,))[1][part]
        assert stored.keys() == wanted.keys()
        for name in sorted(wanted)[:: max(1, len(wanted) // 8)]:
            pair = (np.ascontiguousarray(a).view(np.uint8) for a in (stored[name], wanted[name]))
            assert np.array_equal(*pair), name
