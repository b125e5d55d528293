"""Batches of samples: shuffled, made beside the updates, and resumed exactly (grain)."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

ENDLESS = 1 << 50  # samples


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
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Batches of samples stacked on axis 0, as an iterator with grain's get_state and set_state.

    Step s has the samples s * batch_size to (s + 1) * batch_size - 1. rows: which of these, in
    ascending order and counted from 0, this process gets (None: all); so the samples of a step are
    the same for any number of processes, and so is the iterator's state. num_threads: that prepare
    batches ahead; 0 prepares each when it is asked for, in the caller's thread.
    """
    if rows is None or len(rows) == batch_size:
        own = dataset.batch(batch_size)
    else:
        rows = [int(row) for row in rows]

        def sample(number: int) -> Any:
            step, index = divmod(number, len(rows))
            return dataset[step * batch_size + rows[index]]

        own = grain.MapDataset.range(ENDLESS).map(sample).batch(len(rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(own.to_iter_dataset(options))
