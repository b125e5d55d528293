"""Pairs that the teacher makes while the student trains: nothing is stored but a few in memory.

The teacher makes a round of videos at a time; the last rounds are the buffer, from which all
samples of an update are drawn. Which rounds these are depends on the number of the update alone,
and what is in a round on its number: a resumed run makes its buffer again, and goes on bit for bit.
"""

import sys
from collections.abc import Callable

import grain
import numpy as np
from absl import logging
from jaxtyping import Float

from linvideo_jax.data.texts import Texts
from linvideo_jax.data.trajectories import Head, Index, Trajectories


class Pairs:
    """Random access to the pairs of the buffer, as `trajectories.Pairs` has it to stored ones.

    Row r is step r % steps of video r // steps, counted from the start of the run.

    make(first): the whole trajectories of `batch_size` videos from that number on, alike whenever
    it is called; rounds: in the buffer; updates_per_round: after how many updates the next one
    takes the place of the oldest.
    """

    num_threads = 0  # rounds are made in the caller's thread, at the same update in every process

    def __init__(
        self,
        index: Index,
        texts: Texts,
        make: Callable[[int], Trajectories],
        rounds: int,
        updates_per_round: int,
    ):
        self.index, self.texts = index, texts
        self._make, self._rounds, self._updates = make, rounds, updates_per_round
        self._buffer: dict[int, Trajectories] = {}

    @property
    def _rows(self) -> int:
        return self.index.made["batch_size"] * self.index.steps

    def order(self, seed: int, batch_size: int) -> grain.MapDataset:
        """Rows of the buffer as it is at each update, all alike."""

        def row(number: int, rng: np.random.Generator) -> int:
            oldest = number // batch_size // self._updates
            self._fill(oldest)
            return oldest * self._rows + int(rng.integers(self._rounds * self._rows))

        return grain.MapDataset.range(sys.maxsize).seed(seed).random_map(row)

    def _fill(self, oldest: int) -> None:
        """Makes what lacks of the buffer, and lets go of what has left it."""
        wanted = range(oldest, oldest + self._rounds)
        for number in self._buffer.keys() - set(wanted):
            del self._buffer[number]
        for number in wanted:
            if number not in self._buffer:
                logging.info("the teacher makes round %d of pairs", number)
                self._buffer[number] = self._make(number * self.index.made["batch_size"])

    def another(self, row: int, rng: np.random.Generator) -> int:
        """Any row of the same round."""
        return row - row % self._rows + int(rng.integers(self._rows))

    def _at(self, row: int) -> tuple[Trajectories, int, int]:
        number, rest = divmod(row, self._rows)
        video, step = divmod(rest, self.index.steps)
        return self._buffer[number], video, step

    def x(self, row: int) -> tuple[Head, Float[np.ndarray, "frames height width channels"]]:
        """Which pair it is, and its state."""
        made, video, step = self._at(row)
        return Head(made.seed[video], made.prompt[video], step), made.x[step, video]

    def velocity(
        self, row: int, negative: bool
    ) -> Float[np.ndarray, "frames height width channels"]:
        """The teacher's velocity there, for the prompt or for the negative prompt."""
        made, video, step = self._at(row)
        return (made.u_neg if negative else made.u_cond)[step, video]
