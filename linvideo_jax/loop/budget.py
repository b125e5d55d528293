"""How many steps fit into some minutes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from linvideo_jax.loop.json_files import read_json, write_json


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
