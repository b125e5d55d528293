"""Seconds per update at a model's true size: ADM, and ADM with a score network at c = 5.

python benchmarks/adm_cost.py --out=runs/adm_cost.json

Random weights of Wan2.1-T2V-1.3B, one sample of 81 frames of 480 x 832, one device; the paper says
that ADM takes 4.4 times less time. Each row is written when it is done, and rows that are in the
file are not run again. Tiny, to see that it runs:

JAX_PLATFORMS=cpu python benchmarks/adm_cost.py --out=runs/adm_cost_tiny.json --model=wan_digits \
    --num_frames=5 --height=32 --width=32 --dtype=float32 --updates=2
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import measure
from configs import digits
from linvideo_jax import command_line, loop, rehearsal
from linvideo_jax.errors import UserError
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.transfer import selection, training
from linvideo_jax.transfer.recipe import Recipe, knobs_at, passes

DTYPES = ("bfloat16", "float32")
NUMBERS = ("num_frames", "height", "width", "batch_size", "updates")
FLAGS = {
    "out": (None, "JSON file of the rows"),
    "model": ("wan2_1_t2v_1_3b", "sizes by name"),
    "num_frames": ("81", "of the sample"),
    "height": ("480", "of the sample, px"),
    "width": ("832", "of the sample, px"),
    "batch_size": ("1", "samples of an update"),
    "remat": ("full", "what the backward pass keeps, as transfer.remat"),
    "dtype": ("bfloat16", f"of the matrix products: {', '.join(DTYPES)}"),
    "updates": ("5", "timed, after one that is not"),
}
SCORE = {"objective": "adm_score", "score_updates": 5}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "adm": {},
    # The paper does not say how the critic's samples are made: here by one Euler step, or by four.
    "adm_score_1_step": {**SCORE, "rollout_steps": 1},
    "adm_score_4_steps": {**SCORE, "rollout_steps": 4},
}
# While scores move every layer computes both attentions; then 16 of 30 are linear.
PHASES = ("mixed", "rounded")
LINEAR_SHARE = 16 / 30


def program(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "out")
    numbers = command_line.integers(given, *NUMBERS)
    command_line.choice("dtype", given["dtype"], DTYPES)
    path = Path(given["out"])
    fixed = {name: value for name, value in given.items() if name not in ("out", "help")}
    fixed["device"] = jax.devices()[0].device_kind
    found = loop.read_json(path) if path.exists() else {"settings": fixed, "rows": {}}
    if not isinstance(found, dict) or not {"settings", "rows"} <= found.keys():
        raise UserError(f"{path} is no result of this program: choose another --out.")
    if found["settings"] != fixed:
        raise UserError(f"{path} has rows of other settings: choose another --out.")
    for name, changes in OBJECTIVES.items():
        for phase in PHASES:
            if f"{name}, {phase}" in found["rows"]:
                continue
            print(f"{name}, {phase}", flush=True)
            row = measured(changes, phase, given, numbers)
            found["rows"][f"{name}, {phase}"] = row
            loop.write_json(path, found)
    print(table(found["rows"]))


def measured(changes, phase: str, given, numbers) -> dict[str, Any]:
    """A row: seconds of the timed updates, memory, and the passes that were counted."""
    config = digits.get_config()
    config.model, config.dtype = given["model"], given["dtype"]
    size = {name: numbers[name] for name in ("height", "width", "num_frames")}
    config.collect.sampling = ConfigDict(size | {"num_inference_steps": 50})
    config.transfer.update(batch_size=numbers["batch_size"], remat=given["remat"], **changes)
    problem = rehearsal.problem(config)
    recipe = rehearsal.recipe(config, problem, meshes.make({}, jax.devices()[:1]))
    row = {"passes": passes(recipe)._asdict(), "forwards": recipe.forwards}
    try:
        return row | timed(config, problem, recipe, phase, numbers["updates"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"error": "out of memory"}


def timed(
    config, problem: rehearsal.Problem, recipe: Recipe, phase: str, updates: int
) -> dict[str, Any]:
    """Seconds per update, what compiling took, and the program's memory."""
    settings, sample = config.transfer, (problem.latent_shape, problem.text_shape)
    teacher = measure.random_params(WanTransformer, recipe.teacher, jnp.float32)
    state = training.initial_state(settings, recipe.student, teacher)
    state |= training.objectives_state(recipe, teacher, *sample)
    if phase == "rounded":
        layers = recipe.student.num_layers
        state = selection.placed(state, tuple(range(round(LINEAR_SHARE * layers))))
    batch = rehearsal.batch(config, recipe, problem, np.random.default_rng(0))
    knobs = knobs_at(settings, settings.warmup_steps, 1e-5, 5.0, phase == "mixed")
    began = time.perf_counter()
    key = jax.random.key(0)
    compiled = training.update.lower(recipe, state, teacher, batch, knobs, key).compile()
    row: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    memory = compiled.memory_analysis()
    if memory is not None:
        row["temporary_bytes"] = memory.temp_size_in_bytes
        row["argument_bytes"] = memory.argument_size_in_bytes
    seconds = []
    for number in range(updates + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, teacher, batch, knobs, key)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
        print(f"  update {number}: {seconds[-1]:.3g} s, loss {loss:.4g}", flush=True)
    return row | {"seconds": seconds[1:], "seconds_per_update": float(np.median(seconds[1:]))}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Seconds per update and their ratio to ADM's in the same phase, as Markdown."""
    lines = ["| | s per update | to ADM | forwards | to ADM |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        base = rows.get(f"adm, {name.rsplit(', ')[-1]}", {})
        seconds = row.get("seconds_per_update")
        shown = f"{seconds:.3g}" if seconds else row["error"]
        ratio = base.get("seconds_per_update")
        lines.append(
            f"| {name} | {shown} | {seconds / ratio if seconds and ratio else float('nan'):.2f} "
            f"| {row['forwards']} | {row['forwards'] / base['forwards']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(program, argv, "the same command goes on with the next row")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
