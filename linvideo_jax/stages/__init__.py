"""The stages that a configuration names, each `run(config, workdir)` in a module of its name."""

import importlib
from contextlib import nullcontext
from pathlib import Path

from linvideo_jax import workdirs
from linvideo_jax.errors import UserError

STAGES = ("pretrain", "collect", "profile", "transfer", "evaluate", "smoke")


def needs_workdir(config) -> bool:
    """Whether a stage of the configuration reads or writes files of a run."""
    return set(config.stages) != {"smoke"}


def run(config, workdir: Path | None) -> None:
    """Runs `config.stages` in their order; each goes on from what it finished before.

    workdir: None if no stage needs one (`needs_workdir`).
    """
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages names {', '.join(unknown)}; known are {', '.join(STAGES)}.")
    claim = workdirs.claimed(workdir, config) if needs_workdir(config) else nullcontext()
    with claim:
        for stage in config.stages:
            importlib.import_module(f"linvideo_jax.stages.{stage}").run(config, workdir)
