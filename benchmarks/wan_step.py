"""An update of real size on the devices that are here, for each remat policy: time, memory, MFU.

python benchmarks/wan_step.py --out=runs/wan_step.json
JAX_PLATFORMS=cpu python benchmarks/wan_step.py --out=runs/step.json --model=wan_digits --batches=1

Random weights, the model's own video size, ADM with every layer mixed, which is the costly part of
a run. Each case is a process of its own, so that one which runs out of memory ends alone; its
figures, or how it ended, are in --out at once, and what is there is not measured again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from linvideo_jax import command_line, config_files
from linvideo_jax.errors import UserError
from linvideo_jax.loop import read_json, write_json
from linvideo_jax.models.remat import POLICIES
from linvideo_jax.stages import smoke

FLAGS = {
    "out": (None, "JSON file of the figures"),
    "model": ("wan2_1_t2v_1_3b", "name of the model"),
    "remat": ("full,offload,products,none", "policies, with commas"),
    "batches": ("1", "samples of every part of the batch, with commas"),
    "accumulate": ("1", "parts of a batch, with commas"),
    "optimizer": ("adamw", "of transfer.optimizer"),
    "case": (None, "one case as JSON, measured in this process; the program calls itself with it"),
}
CONFIG = Path(__file__).parents[1] / "configs" / "smoke.py"


def measure(case: dict) -> dict:
    """Figures of one case in this process."""
    config = config_files.load(str(CONFIG))
    config.model = case["model"]
    config.transfer.update({name: case[name] for name in ("remat", "accumulate", "optimizer")})
    config.smoke.update({"samples": case["samples"], "num_steps": case["steps"]})
    return smoke.measure(smoke.with_batch(config), case["steps"])


def name_of(case: dict) -> str:
    """Of a case in the file."""
    return " ".join(f"{key}={value}" for key, value in case.items())


def wan_step(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    values = command_line.define(FLAGS)
    flags.DEFINE_integer("steps", 3, "after the one that compiles", 1, flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    if given["case"]:
        print("RESULT " + json.dumps(measure(json.loads(given["case"]))))
        return
    command_line.required(given, "out")
    out = Path(given["out"])
    rows = read_json(out) if out.exists() else {}
    for remat in given["remat"].split(","):
        command_line.choice("remat", remat, POLICIES)
    batches, parts = (_counts(name, given[name]) for name in ("batches", "accumulate"))
    cases = [
        {
            "model": given["model"],
            "remat": remat,
            "samples": samples,
            "accumulate": accumulate,
            "optimizer": given["optimizer"],
            "steps": given["steps"],
        }
        for remat in given["remat"].split(",")
        for samples in batches
        for accumulate in parts
    ]
    for case in cases:
        name = name_of(case)
        if name in rows:
            continue
        print(name, flush=True)
        began = time.time()
        command = [sys.executable, __file__, f"--case={json.dumps(case)}"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            rows[name] = json.loads(lines[-1].removeprefix("RESULT "))
            print(smoke.page(rows[name]), end="\n\n", flush=True)
        else:
            told = [line for line in done.stderr.splitlines() if line.strip()]
            memory = [line for line in told if "RESOURCE_EXHAUSTED" in line or "error:" in line]
            rows[name] = {"error": (memory or told or ["no word"])[-1][:500]}
            print("  " + rows[name]["error"], end="\n\n", flush=True)
        rows[name]["wall_seconds"] = time.time() - began
        write_json(out, rows)
    print(table(rows))


def _counts(name: str, value: str) -> list[int]:
    """Whole numbers with commas between; UserError if they are not."""
    words = value.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--{name}={value} is wrong: write whole numbers from 1 on, with commas.")
    return [int(word) for word in words]


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| case | step, s | MFU | memory, GiB | first step, s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:80]} | | | |")
            continue
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = f"{row['memory'] / smoke.GIB:.1f}"
        lines.append(f"| {name} | {seconds:.3g} | {mfu} | {memory} | {row['first_seconds']:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(wan_step, argv, "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
