"""Arrays whose values are read when they are asked for: parameters larger than memory."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

# Elements that are cast at a time: casting a text embedding of 1e9 would else take its size twice.
BLOCK = 1 << 24


class LazyArray:
    """Shape and dtype of an array, and how to read it; `numpy.asarray` reads, nothing is kept."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read
        self.ndim, self.size = len(self.shape), prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in another dtype; OverflowError for a value that becomes infinite."""
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if array.ndim > 1 and array.T.flags.c_contiguous:
        return cast(array.T, dtype).T
    result = np.empty(array.shape, dtype)
    source, target = np.ascontiguousarray(array).reshape(-1), result.reshape(-1)
    for start in range(0, array.size, BLOCK):
        piece = slice(start, start + BLOCK)
        with np.errstate(over="ignore"):
            target[piece] = source[piece].astype(dtype)
        if (np.isinf(target[piece]) & ~np.isinf(source[piece])).any():
            raise OverflowError(f"values beyond {dtype}")
    return result
