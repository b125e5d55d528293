"""Work side by side in threads: numpy's loops and the reading of files leave Python's lock."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def each(function: Callable[..., T], *columns: Iterable, most: int | None = None) -> list[T]:
    """`list(map(function, *columns))` on all cores, or on `most` of them."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, most or cores)) as pool:
        return list(pool.map(function, *columns))
