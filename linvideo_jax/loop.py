"""One training loop for every stage: steps, metrics, checkpoints, interruption, exact resume."""

import json
import signal
import sys
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
from linvideo_jax.folders import replacing
from linvideo_jax.progress import Progress

Metrics = dict[str, jax.Array]


class Diverged(UserError):
    """A metric is not finite after `step` updates."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and its state is saved."""


class _Signals:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps.

    A second signal stops at once: what was done since the last save is lost.
    """

    def __enter__(self):
        self.received = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        print("stopping after this step", file=sys.stderr)

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
    """Runs `state, metrics = update(state, step)` for step 0 .. num_steps - 1; the last state.

    `update` must depend on its arguments alone (randomness folded from the step): then a run that
    was interrupted and resumed equals an undisturbed one bit for bit. State is saved in
    `folder/checkpoints` every `save_every` steps, at the end, and when a signal arrives.

    Raises Interrupted after that save, Diverged when a metric is not finite (such a state is never
    saved), and UserError when the state in `folder` is of another model.
    """
    folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        first = 0
        if manager.latest_step() is not None:
            first = manager.latest_step()
            state = _restore(manager, first, state, folder)
            logging.info("%s: resumed after step %d", name, first)
        if first >= num_steps:
            return state
        with (
            MetricsFile(folder, first) as metrics_file,
            _Signals() as signals,
            Progress(name, num_steps, first) as progress,
        ):
            for step in range(first, num_steps):
                state, metrics = update(state, step)
                done, stopped = step + 1, signals.received
                log = done % log_every == 0 or done == num_steps
                save = done % save_every == 0 or done == num_steps or stopped
                if log or save:
                    values = jax.device_get(metrics)
                    _check_finite(name, done, values, folder)
                if log:
                    metrics_file.write(done, values | {"time": time.time()})
                    progress.update(done, f"loss {float(values['loss']):.4g}")
                if save:
                    manager.save(done, args=ocp.args.StandardSave(state), force=True)
                if stopped:
                    raise Interrupted(f"{name} stopped after step {done} of {num_steps}")
    return state


def _restore(manager: ocp.CheckpointManager, step: int, state: Any, folder: Path) -> Any:
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(template))
    except Exception as error:  # Orbax raises many kinds, for a damaged file too
        logging.info("restoring %s: %s", folder, error)
        raise UserError(
            f"the state in {folder} is damaged or of another model: choose another --workdir, or "
            "delete it."
        ) from error


def _check_finite(name: str, step: int, values: dict[str, Any], folder: Path) -> None:
    for metric, value in values.items():
        if not np.isfinite(value).all():
            raise Diverged(
                f"{name} diverged at step {step} ({metric} is not finite): lower its learning rate "
                f"and delete {folder}, or go on from the state before.",
                step,
            )


def steps_within(
    minutes: float, num_steps: int, folder: Path, trial: Callable[[int], Any], trials: int = 30
) -> int:
    """How many steps a stage takes: `num_steps`, or as many as fit into `minutes` if that is not 0.

    `trial(i)` makes update i and throws it away; the first ones, which compile, count in the time.
    The number is kept in `folder/plan.json`, so that a resumed run has the same schedule.
    """
    if not minutes:
        return num_steps
    plan = Path(folder) / "plan.json"
    if not plan.exists():
        start = time.time()
        jax.block_until_ready([trial(i) for i in range(4)])
        compiled = time.time()
        jax.block_until_ready([trial(i) for i in range(trials)])
        seconds = (time.time() - compiled) / trials
        left = max(60.0 * minutes - (time.time() - start), 0.0)
        write_json(plan, {"minutes": minutes, "num_steps": max(1, int(left / seconds))})
    return read_json(plan)["num_steps"]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no half-written file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError if it is not one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): delete it and run again."
        ) from None
