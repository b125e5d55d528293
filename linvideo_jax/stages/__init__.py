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
# Each stage, and the groups of a configuration that it reads.
NEEDS = {
    "pretrain": ("pretrain",),
    "collect": ("collect",),
    "profile": ("profile", "collect", "transfer", "evaluate"),
    "transfer": ("collect", "transfer"),
    "distill": ("distill",),
    "evaluate": ("evaluate",),
    "smoke": ("collect", "smoke", "transfer"),
}
STAGES = tuple(NEEDS)
# Those whose module has a check(config) of all that can be told beforehand.
CHECKED = ("collect", "transfer", "distill", "evaluate")


def needs_workdir(config) -> bool:
    """Whether a stage of the configuration reads or writes files of a run."""
    return set(config.stages) != {"smoke"}


def run(config, workdir: Path | None, wait: bool = False) -> None:
    """Runs `config.stages` in their order; each goes on from what it finished before.

    With several hosts, which have one workdir, the first does alone what is not `SHARED`. workdir:
    None if no stage needs one (`needs_workdir`). wait: until no other process is at work there, in
    the place of an error.
    """
    check(config)
    meshes.resolve(meshes.of_config(config), jax.device_count())
    claims = hosts.is_first() and needs_workdir(config)
    with workdirs.claimed(workdir, config, wait) if claims else contextlib.nullcontext():
        for number, stage in enumerate(config.stages):
            if hosts.is_first() or stage in SHARED:
                _module(stage).run(config, workdir)
            hosts.wait(f"stage {number}")


def check(config) -> None:
    """UserError for what no stage could run with, before one runs and anything is written."""
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages names {', '.join(unknown)}; known are {', '.join(STAGES)}.")
    for stage in config.stages:
        for group in NEEDS[stage]:
            if group not in config:
                raise UserError(
                    f"the stage {stage} needs the group {group}, which this configuration lacks: "
                    "choose another --config or other stages."
                )
    for stage in config.stages:
        # What pretrain makes is not there yet.
        if stage in CHECKED and "pretrain" not in config.stages:
            _module(stage).check(config)


def _module(stage: str):
    return importlib.import_module(f"linvideo_jax.stages.{stage}")
