"""A profile of a few steps, for TensorBoard or xprof."""

from pathlib import Path
from typing import Any

import jax

STEPS = 3


class Trace:
    """Writes a jax.profiler trace of the 3 steps after step `at` to `folder`; at 0: never."""

    def __init__(self, folder: Path, at: int):
        self._folder = folder
        self._first = at if at and not folder.exists() else None
        self._open = False

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 0."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, result: Any) -> None:
        """Call after it, with something that the device computes last."""
        if self._open and step == self._first + STEPS - 1:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._open = False
