"""The states of a run on disk: Orbax checkpoints of arrays, data iterator and the loop's own."""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from linvideo_jax import folders
from linvideo_jax.errors import UserError


class _NewestGood:
    """Keeps the newest state at which nothing was wrong, however many came after it."""

    def should_preserve(self, checkpoints, *, context):
        good = [info.step for info in checkpoints if (info.metrics or {}).get("good", 1.0)]
        return [info.step == max(good, default=None) for info in checkpoints]


class States:
    """Checkpoints of one run, by steps done; a context manager that waits for the last one.

    A state is there whole or not at all: Orbax writes under a temporary name, beside the steps that
    follow. The newest `keep` stay, the newest good one, and the one where the metric `best` was
    least.

    Args:
      folder: of the checkpoints.
      like: the state at the beginning; restored ones have its shapes, dtypes and placement.
      data: an iterator of grain, or None; `restore` moves it.
    """

    def __init__(self, folder: Path, like: Any, data: Any, keep: int, best: str = ""):
        self.folder, self._data = folder, data
        self._template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._size = sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._template)
        )

        def value(metrics):
            return -metrics.get(best, math.inf)

        policies = [checkpoint_managers.LatestN(keep), _NewestGood()]
        if best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=value, n=1))
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=value,
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "States":
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:
                raise self._not_saved(error) from error
            logging.info("closing %s: %s", self.folder, error)

    @property
    def latest(self) -> int | None:
        """Steps done of the newest state."""
        return self._manager.latest_step()

    def newest_good(self) -> int | None:
        """Steps done of the newest state at which nothing was wrong; saves are waited for."""
        self.wait()
        steps = self._manager.all_steps()
        good = [step for step in steps if (self._manager.metrics(step) or {}).get("good", 1.0)]
        return max(good, default=None)

    def save(self, step: int, state: Any, own: Any, metrics: dict[str, float]) -> None:
        """Starts to write; waits for the save before. `own`: JSON of the loop.

        When it returns the arrays are in the host's memory, and their buffers may be given back.
        metrics: "good" (1 or 0), and `best`. UserError if it, or the one before, failed.
        """
        items = {"state": ocp.args.StandardSave(state), "loop": ocp.args.JsonSave(own)}
        if self._data is not None:
            # Not grain's own: its files are of one number of hosts.
            items["data"] = ocp.args.JsonSave(self._data.get_state())
        self.wait()
        folders.check_space(self.folder, self._size)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        except Exception as error:
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Until what is being saved is there; UserError if that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def _not_saved(self, error: Exception) -> UserError:
        there = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
        onwards = f"goes on from step {max(there)}" if there else "begins anew"
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        return UserError(
            f"a state could not be saved in {self.folder} ({reason[:200]}): make room if the disk "
            f"is full; the same command then {onwards}."
        )

    def restore(self, step: int) -> tuple[Any, Any]:
        """(state, own) of a step; the iterator is moved to where it was."""
        items = {
            "state": ocp.args.StandardRestore(self._template),
            "loop": ocp.args.JsonRestore(),
        }
        if self._data is not None:
            items["data"] = ocp.args.JsonRestore()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds, for a damaged file too
            logging.info("restoring %s: %s", self.folder, error)
            raise UserError(
                f"the state in {self.folder.parent} is damaged or of another model: choose another "
                "--workdir, or delete it."
            ) from error
        if self._data is not None:
            self._data.set_state(restored["data"])
        return restored["state"], restored["loop"]
