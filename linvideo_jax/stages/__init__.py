"""The stages that a configuration names, each `run(config, workdir)` in a module of its name."""

import importlib
from pathlib import Path

from linvideo_jax import workdirs
from linvideo_jax.errors import UserError

STAGES = ("pretrain", "collect", "profile", "transfer", "distill", "evaluate")


def run(config, workdir: Path) -> None:
    """Runs `config.stages` in their order; each goes on from what it finished before."""
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages names {', '.join(unknown)}; known are {', '.join(STAGES)}.")
    with workdirs.claimed(workdir, config):
        for stage in config.stages:
            importlib.import_module(f"linvideo_jax.stages.{stage}").run(config, Path(workdir))
