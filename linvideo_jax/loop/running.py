"""The loop itself."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from linvideo_jax.errors import UserError
from linvideo_jax.loop.guard import Guard
from linvideo_jax.loop.metrics_file import MetricsFile, NoMetricsFile
from linvideo_jax.loop.signals import Interrupted, Signals
from linvideo_jax.loop.states import States
from linvideo_jax.loop.tracing import Trace
from linvideo_jax.parallel import hosts
from linvideo_jax.progress import Progress

Metrics = dict[str, jax.Array]
Event = tuple[int, Callable[[int, Any], None]]


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
    best: str = "",
    guard: Guard | None = None,
    events: Sequence[Event] = (),
    profile_at: int = 0,
) -> Any:
    """Runs `state, metrics = update(state, step)` for step 0 .. num_steps - 1; the last state.

    `update` must depend on its arguments alone (randomness folded from the step): then a run that
    was interrupted or killed and resumed equals an undisturbed one bit for bit. It may give back
    (donate) the buffers of the state that it is given, of the first one too: a state is not used
    after its update. With several hosts each runs the same loop: the first writes the metrics, all
    write their parts of the states, and a signal to one stops all after the same step. The host
    waits for the device only where metrics are logged or a state is saved. A metric "loss" must be
    among the metrics.

    Args:
      folder: `checkpoints` in it holds the states, `metrics.jsonl` a line for every logged step.
      save_every, log_every: in steps; the last step counts too, and a signal saves.
      data: an iterator of grain, or any with its get_state and set_state: then it is
        `update(state, step, next(data))`, and it is saved and restored with the state.
      keep: how many of the newest states stay.
      best: a metric; the state is kept, too, up to which its mean since the save before was least.
      guard: for a loss that diverges; without one, only values that are not finite stop the run.
      events: (every, function) pairs: function(steps done, state) after each `every` steps, and
        the last, and again where a resumed run begins; 0: never. They keep no array of the state.
        Their time is not the steps'.
      profile_at: 3 steps after so many go to `folder/profile-trace` for TensorBoard; 0: none.

    Raises Interrupted after a signal and its save, Diverged when a metric is not finite or the
    guard complains (such a state is never saved), and UserError when the disk is full, or when the
    state in `folder` is of another model.
    """
    folder, guard = Path(folder).absolute(), guard or Guard()
    trace = Trace(folder / "profile-trace", profile_at)
    with States(folder / "checkpoints", state, data, keep, best) as states:
        first = states.latest or 0
        if first:
            state, own = states.restore(first)
            guard.load(own)
            logging.info("%s: resumed after step %d", name, first)
        if first >= num_steps:
            return state
        with (
            MetricsFile(folder, first) if hosts.is_first() else NoMetricsFile() as metrics_file,
            Signals() as signals,
            Progress(name, num_steps, first, shown=hosts.is_first()) as progress,
        ):
            with _writing(name, folder), signals.cutting():
                _call(events, first, state, resumed=True)
            clock, watched, since_save = _Clock(first), [], []
            for step in range(first, num_steps):
                trace.before(step)
                batch = () if data is None else (next(data),)
                state, metrics = update(state, step, *batch)
                trace.after(step, metrics)
                done, last = step + 1, step + 1 == num_steps
                stopped = hosts.stop_now(done, signals.received)
                log = done % log_every == 0 or last
                save = done % save_every == 0 or last or stopped
                names = {"loss", guard.metric, best} & set(metrics)
                watched.append({key: metrics[key] for key in names})
                if log or save:
                    values, watched = jax.device_get((metrics, watched))
                    _check(name, guard, done, values, watched, states)
                    since_save += [at[best] for at in watched if best in at]
                    watched = []
                if log:
                    values |= {"seconds_per_step": clock.lap(done), "time": time.time()}
                    with _writing(name, folder):
                        metrics_file.write(done, values)
                    progress.update(done, f"loss {float(values['loss']):.4g}")
                with clock.paused():
                    if not stopped:
                        with _writing(name, folder), signals.cutting():
                            _call(events, done, state, last)
                    if save:
                        figures = {"good": float(guard.good)}
                        if since_save:
                            figures[best] = float(np.mean(since_save))
                        elif best and last:
                            logging.warning("%s: no metric is called %s", name, best)
                        states.save(done, state, guard.to_dict(), figures)
                        since_save = []
                if stopped:
                    states.wait()
                    raise Interrupted(f"{name} stopped after step {done} of {num_steps}")
    return state


def _call(events: Sequence[Event], done: int, state: Any, last=False, resumed=False) -> None:
    for every, function in events:
        if every and (last or done % every == 0) and (done or not resumed):
            function(done, state)


def _check(
    name: str,
    guard: Guard,
    done: int,
    values: dict[str, Any],
    watched: Sequence[dict[str, Any]],
    states: States,
) -> None:
    """Diverged for the first of the `watched` steps up to `done` at which something is wrong."""
    complaints = [
        (step, guard.complaint(step - 1, {key: float(value) for key, value in at.items()}))
        for step, at in enumerate(watched, done - len(watched) + 1)
    ]
    complaints += [
        (done, f"{key} is not finite")
        for key, value in values.items()
        if not np.isfinite(value).all()
    ]
    for step, complaint in complaints:
        if complaint:
            good = states.newest_good()
            kept = f"its last good state is {states.folder / str(good)}" if good else "none is kept"
            raise Diverged(
                f"{name} diverged at step {step} ({complaint}): lower its learning rate in another "
                f"--workdir; {kept}.",
                step,
            )


class _Clock:
    """Seconds a step, without what happens while `paused`."""

    def __init__(self, first: int):
        self._step, self._since = first, time.perf_counter()

    def lap(self, done: int) -> float:
        """Seconds a step since the last lap; the device has just been waited for."""
        seconds = (time.perf_counter() - self._since) / (done - self._step)
        self._step, self._since = done, time.perf_counter()
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


@contextlib.contextmanager
def _writing(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{name} cannot write to {folder} ({error.strerror or error}): make room there; the "
            "same command then goes on from its last state."
        ) from error
