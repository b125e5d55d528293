"""What a run measured, a JSON line for each logged step, and the same in TensorBoard."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from linvideo_jax.folders import replacing


class MetricsFile:
    """Appends one JSON line a step to `metrics.jsonl` and the same scalars to TensorBoard.

    Lines of steps that a resumed run makes again are dropped when it opens the file.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = {"step": step} | {name: np.asarray(value).tolist() for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            array = np.asarray(value)
            if array.ndim == 0:
                self._board.add_scalar(name, float(array), step)
            else:
                for index, element in enumerate(array.ravel()):
                    self._board.add_scalar(f"{name}/{index}", float(element), step)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception) -> None:
        self._board.close()


class NoMetricsFile(contextlib.nullcontext):
    """What a host that is not the first has in its place."""

    def __enter__(self) -> "NoMetricsFile":
        return self

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that a killed process left unfinished."""
    path = Path(folder) / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
