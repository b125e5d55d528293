"""Progress of a long job: done of total, rate and remaining time, on standard error."""

import sys

from tqdm import tqdm


class _LineBar(tqdm):
    """Whole lines instead of one that is drawn over: for logs."""

    @staticmethod
    def status_printer(file):
        return lambda status: print(status, file=file, flush=True) if status else None


class Progress:
    """A bar in a terminal, a line now and then elsewhere; a context manager.

    Args:
      name: what is being done.
      total: the count at the end.
      done: the count at the start, of a resumed job; the rate is that of this run.
      unit: what is counted; "B" is shown in kB, MB and so on.
      shown: False says nothing, as hosts do that are not the first.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, unit: str = "step", shown: bool = True
    ):
        terminal = sys.stderr.isatty()
        self._bar = (tqdm if terminal else _LineBar)(
            desc=name,
            total=total,
            initial=done,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            file=sys.stderr,
            mininterval=0.2 if terminal else 15,
            dynamic_ncols=terminal,
            leave=True,
            disable=not shown,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def update(self, done: int, note: str = "") -> None:
        """Sets the count (not an increment) and a remark behind it."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def add(self, count: int) -> None:
        """Adds to the count."""
        self._bar.update(count)
