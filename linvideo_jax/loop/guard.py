"""Notices a loss that is not finite, and one that grows instead of falling."""

import math
from collections import deque
from statistics import median
from typing import Any

WINDOW = 200  # values that the running median is of
FEWEST = 20  # of them before anything is judged


class Guard:
    """Watches every step's loss for a value that is not finite, and one metric for divergence.

    Args:
      metric: one that is not negative, such as an error; None: no divergence is looked for.
      factor: a value above this times the median of the 200 before it is too high. 0: none is.
      steps: so many of them on end are a divergence.
      fresh_at: steps from which the metric is another quantity, so that the median begins anew.
    """

    def __init__(
        self,
        metric: str | None = None,
        factor: float = 100.0,
        steps: int = 20,
        fresh_at: tuple[int, ...] = (),
    ):
        self.metric, self._factor, self._steps = metric, factor, steps
        self._fresh_at = fresh_at
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._high = 0

    @property
    def good(self) -> bool:
        """Whether the last value was no higher than it may be."""
        return self._high == 0

    def complaint(self, step: int, values: dict[str, float]) -> str | None:
        """What is wrong after this step (counted from 0), as the middle of a sentence; or None."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is not finite"
        if step in self._fresh_at:
            self._window.clear()
            self._high = 0
        if not self._factor or self.metric not in values:
            return None
        value = values[self.metric]
        if len(self._window) >= FEWEST:
            usual = median(self._window)
            if usual > 0 and value > self._factor * usual:
                self._high += 1
                if self._high < self._steps:
                    return None
                return (
                    f"{self.metric} is {value:.3g}, for {self._high} steps above "
                    f"{self._factor:g} times its running median, {usual:.3g}"
                )
        self._high = 0
        self._window.append(value)
        return None

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike, as JSON."""
        return {"window": list(self._window), "high": self._high}

    def load(self, values: dict[str, Any]) -> None:
        """Takes what `to_dict` gave."""
        self._window = deque(values["window"], maxlen=WINDOW)
        self._high = values["high"]
