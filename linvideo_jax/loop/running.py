"""The loop itself."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from linvideo_jax.errors import UserError
from linvideo_jax.loop.metrics_file import MetricsFile
from linvideo_jax.loop.signals import Interrupted, Signals
from linvideo_jax.loop.states import States
from linvideo_jax.progress import Progress

Metrics = dict[str, jax.Array]


class Diverged(UserError):
    """The training has diverged after `step` updates."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def run(
    name: str,
    update: Callable[..., tuple[Any, Metrics]],
    state: Any,
    *,
    num_steps: int,
    folder: Path,
    save_every: int,
    log_every: int,
    data: Any = None,
    keep: int = 2,
) -> Any:
    """Runs `state, metrics = update(state, step)` for step 0 .. num_steps - 1; the last state.

    With `data`, an iterator of grain or any with its get_state and set_state, it is
    `update(state, step, next(data))`, and the iterator is saved and restored with the state.
    `update` must depend on its arguments alone (randomness folded from the step): then a run that
    was interrupted and resumed equals an undisturbed one bit for bit. State is saved in
    `folder/checkpoints` every `save_every` steps, at the end, and when a signal arrives, while the
    next steps run; the newest `keep` stay.

    Raises Interrupted after that save, and UserError when a metric is not finite (such a state is
    never saved) or when the state in `folder` is of another model.
    """
    folder = Path(folder).absolute()
    with States(folder / "checkpoints", keep) as states:
        first = states.latest or 0
        if first:
            state = states.restore(first, state, data)
            logging.info("%s: resumed after step %d", name, first)
        if first >= num_steps:
            return state
        with (
            MetricsFile(folder, first) as metrics_file,
            Signals() as signals,
            Progress(name, num_steps, first) as progress,
        ):
            for step in range(first, num_steps):
                batch = () if data is None else (next(data),)
                state, metrics = update(state, step, *batch)
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
                    states.save(done, state, data)
                if stopped:
                    raise Interrupted(f"{name} stopped after step {done} of {num_steps}")
    return state


def _check_finite(name: str, step: int, values: dict[str, Any], folder: Path) -> None:
    for metric, value in values.items():
        if not np.isfinite(value).all():
            raise Diverged(
                f"{name} diverged at step {step} ({metric} is not finite): lower its learning rate "
                f"and delete {folder}, or go on from the state before.",
                step,
            )
