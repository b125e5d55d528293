"""One training loop for every stage: steps, metrics, checkpoints, interruption, exact resume."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from tensorboardX import SummaryWriter

from linvideo_jax.errors import UserError
from linvideo_jax.progress import Progress

Metrics = dict[str, jax.Array]


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state is saved."""


class _Signals:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps."""

    def __enter__(self):
        self.received = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        self.received = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class MetricsFile:
    """Appends one JSON line a step to `metrics.jsonl` and the same scalars to TensorBoard.

    Lines of steps that a resumed run makes again are dropped when it opens the file.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        temporary = self._path.with_suffix(".jsonl.part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(self._path)
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

    def close(self) -> None:
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a killed process left unfinished is dropped."""
    path = Path(folder) / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def run(
    name: str,
    update: Callable[[Any, int], tuple[Any, Metrics]],
    state: Any,
    *,
    num_steps: int,
    folder: Path,
    save_every: int,
    log_every: int,
) -> Any:
    """Runs `state, metrics = update(state, step)` for step 0 .. num_steps - 1 and returns the last state.

    `update` must depend on its arguments alone (randomness folded from the step): then a run that
    was interrupted and resumed equals an undisturbed one bit for bit. State is saved in
    `folder/checkpoints` every `save_every` steps, at the end, and when a signal arrives.

    Raises Interrupted after that save, and UserError when the loss is not finite.
    """
    folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        first = 0
        if manager.latest_step() is not None:
            first = manager.latest_step()
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(first, args=ocp.args.StandardRestore(template))
            logging.info("%s: resumed after step %d", name, first)
        if first >= num_steps:
            return state
        metrics_file = MetricsFile(folder, first)

        def save(step: int) -> None:
            if manager.latest_step() != step:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)

        with _Signals() as signals, Progress(name, num_steps, first) as progress:
            for step in range(first, num_steps):
                state, metrics = update(state, step)
                done = step + 1
                if done % log_every == 0 or done == num_steps:
                    values = jax.device_get(metrics)
                    if not np.isfinite(values["loss"]):
                        raise UserError(
                            f"{name} diverged at step {done} (loss {values['loss']}): lower its "
                            f"learning rate; the last good state is in {folder / 'checkpoints'}."
                        )
                    metrics_file.write(done, values | {"time": time.time()})
                    progress.update(done, f"loss {float(values['loss']):.4g}")
                if signals.received:
                    save(done)
                    raise Interrupted(f"{name} stopped after step {done} of {num_steps}")
                if done % save_every == 0 or done == num_steps:
                    save(done)
        metrics_file.close()
    return state


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no half-written file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError if it is not one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); delete it and run again.") from None
