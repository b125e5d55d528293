"""The states of a run on disk: Orbax checkpoints of arrays, data iterator and the loop's own."""

from pathlib import Path
from typing import Any

from grain import checkpoint as grain_checkpoint
import jax
import orbax.checkpoint as ocp
from absl import logging

from linvideo_jax.errors import UserError


class States:
    """Checkpoints of one run, by steps done; a context manager that waits for the last one.

    folder: of the checkpoints; `keep`: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps done of the newest state."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Writes beside the steps that follow; the one before is waited for."""
        items = {"state": ocp.args.StandardSave(state)}
        if data is not None:
            items["data"] = grain_checkpoint.CheckpointSave(data)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, state: Any, data: Any = None) -> Any:
        """The state of a step, with the shapes, dtypes and placement of `state`.

        The iterator `data` is moved to where it was.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = {"state": ocp.args.StandardRestore(template)}
        if data is not None:
            items["data"] = grain_checkpoint.CheckpointRestore(data)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))["state"]
        except Exception as error:  # Orbax raises many kinds, for a damaged file too
            logging.info("restoring %s: %s", self._folder, error)
            raise UserError(
                f"the state in {self._folder.parent} is damaged or of another model: choose "
                "another --workdir, or delete it."
            ) from error
