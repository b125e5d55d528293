"""The three networks of a video model, and their parameters as one flat dict: the form on disk.

A module stacks its layers under `blocks`, on axis 0. Flat, each layer has arrays of its own:
`blocks.attn1.to_q.kernel` of 30 layers is `blocks.0.attn1.to_q.kernel` to `blocks.29...`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np

from linvideo_jax import lazy
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray
from linvideo_jax.models import module
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.models.wan import WanConfig, WanTransformer
from linvideo_jax.threads import each

STACKED = "blocks"
FEATURE_MAP = ".feature_map."


@dataclass(frozen=True)
class Part:
    """A network: its module class and its configuration class."""

    module: type
    config: type


PARTS = {
    "transformer": Part(WanTransformer, WanConfig),
    "vae": Part(WanVAE, VAEConfig),
    "text_encoder": Part(UMT5Encoder, UMT5Config),
}

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Flat = dict[str, np.ndarray | LazyArray]


@cache
def _shapes(part: str, config: Any) -> module.Params:
    # Tracing a module's constructor takes a second for the VAE, and every load asks several times.
    return module.shapes(PARTS[part].module, config)


def _leaves(tree: module.Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _flat_names(path: tuple[str, ...], leaf: Any) -> list[str]:
    if path[0] != STACKED:
        return [".".join(path)]
    return [".".join((STACKED, str(i), *path[1:])) for i in range(leaf.shape[0])]


def flat_shapes(part: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Flat name to shape of every parameter of a part with this configuration."""
    shapes = {}
    for path, leaf in _leaves(_shapes(part, config)):
        shape = leaf.shape[1:] if path[0] == STACKED else leaf.shape
        shapes |= dict.fromkeys(_flat_names(path, leaf), tuple(shape))
    return shapes


def flatten(params: module.Params) -> Flat:
    """A module's parameters as numpy arrays under flat names."""
    flat = {}
    for path, leaf in _leaves(params):
        array = np.asarray(leaf)
        names = _flat_names(path, array)
        flat |= zip(names, array, strict=True) if path[0] == STACKED else {names[0]: array}
    return flat


def unflatten(
    part: str,
    config: Any,
    flat: Flat,
    dtype: Any,
    products: Any = None,
    create: Callable[[np.ndarray, Any], Any] = jax.numpy.asarray,
) -> module.Params:
    """The inverse of `flatten`, as JAX arrays of `dtype`, or of the dtype they have for None.

    products: another dtype for the large arrays, which are those that the networks cast to their
    compute dtype themselves: kernels in the layers, and embeddings. create(array, dtype): makes
    the leaf.
    """

    def build(tree: module.Params, path: tuple[str, ...]) -> module.Params:
        built = {}
        for key, leaf in tree.items():
            here = (*path, str(key))
            if isinstance(leaf, dict):
                built[key] = build(leaf, here)
                continue
            arrays = [flat[name] for name in _flat_names(here, leaf)]
            array = _stack(arrays) if here[0] == STACKED else np.asarray(arrays[0])
            large = here[-1] == "embedding" or (here[0], here[-1]) == (STACKED, "kernel")
            built[key] = create(array, products if large and products is not None else dtype)
        return built

    return build(_shapes(part, config), ())


def _stack(arrays: list[np.ndarray | LazyArray]) -> np.ndarray:
    dtypes = {array.dtype for array in arrays}
    stacked = np.empty((len(arrays), *arrays[0].shape), np.result_type(*dtypes))

    def read(layer: int) -> None:
        stacked[layer] = arrays[layer]

    # Lazy arrays are decompressed side by side, in as many times the memory of one.
    each(read, range(len(arrays)), most=8)
    return stacked


def cast(flat: Flat, dtype: str | None) -> Flat:
    """The arrays in a dtype of DTYPES, None as they are; UserError for a value beyond the dtype.

    The error is raised when the array is read, if it is a lazy one.
    """
    if dtype is None:
        return flat
    return {name: _cast(name, array, dtype) for name, array in flat.items()}


def _cast(name: str, array: np.ndarray | LazyArray, dtype: str) -> np.ndarray | LazyArray:
    if isinstance(array, LazyArray):
        return LazyArray(array.shape, DTYPES[dtype], lambda: _cast(name, array.read(), dtype))
    try:
        return lazy.cast(array, DTYPES[dtype])
    except OverflowError:
        message = f"{name} has values beyond {dtype}; choose float32 or bfloat16."
        raise UserError(message) from None
