"""Runs the stages of a configuration in a folder.

python train.py --config=configs/demo.py --workdir=runs/demo
python train.py --config=configs/digits.py --workdir=runs/digits --config.transfer.target=4
python train.py --config=configs/wan14b.py --plan=v5p:4x4x4

Any field of the configuration can be set on the command line. Every stage goes on where it stopped:
after an interruption, give the same command again. On several hosts, start it on each alike.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from linvideo_jax import (
    command_line,
    compiled_programs,
    config_files,
    device_memory,
    folders,
    plan,
    stages,
    sweep,
)
from linvideo_jax.parallel import hosts

FLAGS = {
    "config": (None, "Python file whose get_config() returns the configuration"),
    "workdir": (None, "folder of all that the run makes"),
    "plan": (None, "machine to plan training for, v5p:4x4x4, h100:32 or here; nothing runs"),
}


def train(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input, before anything is written."""
    argv, overrides = config_files.split(argv)
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "config")
    config = config_files.override(config_files.load(given["config"]), overrides)
    if given["plan"]:
        raise SystemExit(plan.run(config, given["plan"]))
    if stages.needs_workdir(config):
        command_line.required(given, "workdir")
        folders.check_writable(Path(given["workdir"]), "--workdir")
    card = hosts.card({"workdir": given["workdir"], "config": config.to_dict()})
    hosts.start(card, config.get("mesh") or {})
    logging.set_verbosity(logging.WARNING)
    compiled_programs.keep_on_disk()
    device_memory.take_most_of_a_gpu()
    run = sweep.run if config.get("sweep") else stages.run
    with hosts.together():
        run(config, given["workdir"] and Path(given["workdir"]))


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(train, argv, "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
