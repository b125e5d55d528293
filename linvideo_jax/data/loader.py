"""Batches of samples: shuffled, made beside the updates, and resumed exactly (grain)."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np


def samples(
    pairs: Any, draw: Callable[[int, np.random.Generator], Any], seed: int, batch_size: int
) -> grain.MapDataset:
    """Sample number i of an endless run, for any i; batch_size: of all processes together.

    pairs: `trajectories.Pairs` or `online.Pairs`; draw(row, rng) makes the sample out of a row,
    with a generator that depends on seed and i alone.
    """
    return pairs.order(seed, batch_size).random_map(draw)


def batches(
    dataset: grain.MapDataset,
    batch_size: int,
    *,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches of samples stacked on axis 0, as an iterator with grain's get_state and set_state.

    Step s has the samples s * batch_size to (s + 1) * batch_size - 1, of which each process gets
    its consecutive part: in the order of processes they are the same for any number of them, and
    so is the iterator's state. num_threads: that prepare batches ahead; 0 prepares each when it is
    asked for, in the caller's thread.

    Raises ValueError if the processes cannot share a batch evenly.
    """
    if batch_size % process_count:
        raise ValueError(f"{process_count} processes cannot share batches of {batch_size} evenly")
    own = dataset.batch(batch_size // process_count)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(own.to_iter_dataset(options))
