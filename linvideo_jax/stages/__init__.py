"""The stages that a configuration names, each `run(config, workdir)` in a module of its name."""

import contextlib
import importlib
from pathlib import Path

import jax

from linvideo_jax import workdirs
from linvideo_jax.errors import UserError
from linvideo_jax.parallel import hosts
from linvideo_jax.parallel import mesh as meshes

SHARED = ("collect", "transfer", "distill", "smoke")
STAGES = ("pretrain", "collect", "profile", "transfer", "distill", "evaluate", "smoke")


def needs_workdir(config) -> bool:
    """Whether a stage of the configuration reads or writes files of a run."""
    return set(config.stages) != {"smoke"}


def run(config, workdir: Path | None, wait: bool = False) -> None:
    """Runs `config.stages` in their order; each goes on from what it finished before.

    With several hosts, which have one workdir, the first does alone what is not `SHARED`. workdir:
    None if no stage needs one (`needs_workdir`). wait: until no other process is at work there, in
    the place of an error.
    """
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages names {', '.join(unknown)}; known are {', '.join(STAGES)}.")
    meshes.resolve(meshes.of_config(config), jax.device_count())
    claims = hosts.is_first() and needs_workdir(config)
    with workdirs.claimed(workdir, config, wait) if claims else contextlib.nullcontext():
        for number, stage in enumerate(config.stages):
            if hosts.is_first() or stage in SHARED:
                importlib.import_module(f"linvideo_jax.stages.{stage}").run(config, workdir)
            hosts.wait(f"stage {number}")
