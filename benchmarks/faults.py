"""A run is killed (SIGKILL) again and again, and must end as if nothing had happened.

python benchmarks/faults.py --workdir=runs/faults --kills=50

Runs train.py on a tiny random model: collect, transfer, evaluate. First undisturbed, then again and
again with a kill at a random moment, each time the same command, until it finishes; then from the
start. Some kills wait for a certain moment: while a shard, a state, the student or the report is
being written. A finished run is lost if its parameters or its metrics are not those of the
undisturbed one, bit for bit, or if a command fails. Writes WORKDIR/faults.json as it goes on, and
goes on from it. On a CPU.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from absl import flags

from benchmarks import tiny
from linvideo_jax import checkpoints, command_line, folders, loop
from linvideo_jax.errors import UserError
from linvideo_jax.parts import flatten
from linvideo_jax.progress import Progress

ROOT = Path(__file__).parents[1]
FIELDS = {
    "dtype": "float32",
    "prompts": "assets/prompts_digits_train.txt",
    "stages": ("collect", "transfer", "evaluate"),
    "collect.num_videos": 8,
    "collect.batch_size": 2,
    "transfer.target": 2,
    "transfer.objective": "mse",
    "transfer.num_steps": 40,
    "transfer.batch_size": 2,
    "transfer.warmup_steps": 0,
    "transfer.round_at": 20,
    "transfer.ema_decay": 0.9,
    "transfer.optimizer": "adamw",
    "transfer.remat": "none",
    "transfer.save_every": 4,
    "transfer.log_every": 1,
    "transfer.report_every": 0.0,
    "transfer.sample_every": 16,
    "transfer.sample_prompts": 1,
    "evaluate.num_prompts": 2,
    "evaluate.height": 16,
    "evaluate.width": 16,
    "evaluate.num_frames": 5,
    "evaluate.classifier": "",
    "evaluate.seeds": (0,),
    "evaluate.num_shown": 1,
}
# What is being written while a file of such a name is there, and how often at most to let it pass.
MOMENTS = {
    "any": (None, 0),
    "shard": ("pairs/.*", 3),
    "state": ("state/transfer/checkpoints/*orbax-checkpoint-tmp*", 5),
    "student": (".final.new", 0),
    "report": (".report.html.part", 20),
}
TIMES = ("time", "seconds_per_step")


class Bench:
    """The command, the folders, and what an undisturbed run gave."""

    def __init__(self, folder: Path, fields: dict[str, Any]):
        self.folder = folder
        self.workdir = folder / "run"
        teacher = folder / "teacher"
        if not teacher.exists():
            tiny.write_teacher(teacher)
        values = {"checkpoint": teacher.absolute(), **fields}
        self._words = [f"--config.{name}={value}" for name, value in values.items()]
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            # So that a killed run's successor compiles nothing again.
            "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.wanted = folder / "undisturbed"
        known = folder / "undisturbed.json"
        if not known.exists():
            shutil.rmtree(self.wanted, ignore_errors=True)
            code, words = self.attempt(self.wanted, None, "any")
            if code:
                raise UserError(f"the undisturbed run failed ({code}): {words}")
            # From the first thing that a run writes to the last.
            first, last = (
                (self.wanted / name).stat().st_mtime for name in ("config.json", "report.html")
            )
            loop.write_json(known, {"seconds": last - first})
        self.seconds = loop.read_json(known)["seconds"]

    def attempt(self, workdir: Path, rng: random.Random | None, moment: str) -> tuple[int, str]:
        """(exit code, last words on standard error) of one command, killed at such a moment.

        Which of them, and for "any" when, is drawn from `rng`; None: it is not killed.
        """
        command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / 'configs/digits.py'}"]
        command += [f"--workdir={workdir}", *self._words]
        with (self.folder / "stderr.txt").open("w+") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stderr=errors, stdout=errors
            )
            try:
                self._kill(process, workdir, rng, *MOMENTS[moment])
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            errors.seek(0)
            return process.returncode, "\n".join(errors.read().splitlines()[-5:])

    def _kill(self, process, workdir, rng, pattern, most):
        if rng is None:
            process.wait()
            return
        lock = workdir / ".lock"
        while process.poll() is None:
            if lock.exists() and lock.read_text().strip() == str(process.pid):
                break  # what it does before it has claimed the folder can lose nothing
            time.sleep(0.02)
        end = time.monotonic() + rng.uniform(0, self.seconds)
        left, was_there = rng.randint(0, most), False
        while process.poll() is None:
            if pattern is None:
                now = time.monotonic() > end
            else:
                there = any(workdir.glob(pattern))
                left -= was_there and not there
                now, was_there = there and left <= 0, there
            if now:
                process.send_signal(signal.SIGKILL)
                return
            # A moment may last a millisecond; looking without pause would slow the run down.
            time.sleep(0.0005 if pattern else 0.01)

    def differences(self) -> list[str]:
        """In what the finished run is not the undisturbed one."""
        ours, theirs = (checkpoints.load(w / "final") for w in (self.workdir, self.wanted))
        found = []
        if ours.linear_layers != theirs.linear_layers:
            found.append("linear layers")
        ours, theirs = flatten(ours.transformer), flatten(theirs.transformer)
        found += [
            name
            for name in theirs
            if not np.array_equal(np.asarray(ours.get(name)), np.asarray(theirs[name]))
        ]
        logs = [
            [
                {key: value for key, value in line.items() if key not in TIMES}
                for line in loop.read_metrics(workdir / "state" / "transfer")
            ]
            for workdir in (self.workdir, self.wanted)
        ]
        if logs[0] != logs[1]:
            found.append("metrics.jsonl")
        for name in ("selection.json", "report.html", "evaluate/metrics.json"):
            if (self.wanted / name).exists() and not (self.workdir / name).exists():
                found.append(f"{name} is missing")
        return found


def run(folder: Path, kills: int, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
    """{kills, by_moment, finished, lost, problems} after `kills` kills and a last whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, fields)
    path = folder / "faults.json"
    counts = {"kills": 0, "by_moment": {}, "finished": 0, "lost": 0, "problems": [], "seed": seed}
    if path.exists():
        counts = loop.read_json(path)
    with Progress("kill", kills, counts["kills"], unit="kill") as progress:
        while True:
            # Each attempt has its own stream: a benchmark that goes on repeats nothing.
            rng = random.Random(f"{counts['seed']} {counts['kills']} {counts['finished']}")
            last = counts["kills"] >= kills
            moment = rng.choice(list(MOMENTS))
            if last and not bench.workdir.exists() and counts["finished"]:
                return counts
            code, words = bench.attempt(bench.workdir, None if last else rng, moment)
            if code == -signal.SIGKILL:
                counts["kills"] += 1
                counts["by_moment"][moment] = counts["by_moment"].get(moment, 0) + 1
            else:
                problems = [f"exit code {code}: {words}"] if code else bench.differences()
                counts["finished"] += 1
                counts["lost"] += bool(problems)
                counts["problems"] += problems
                shutil.rmtree(bench.workdir)
            loop.write_json(path, counts)
            progress.update(min(counts["kills"], kills), f"{counts['lost']} lost")


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define({"workdir": (None, "folder of all that it makes")})
    flags.DEFINE_integer("kills", 50, "how many", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the moments", flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "workdir")
    folders.check_writable(Path(given["workdir"]), "--workdir")
    counts = run(Path(given["workdir"]).absolute(), given["kills"], given["seed"], FIELDS)
    print(json.dumps(counts, indent=2))
    print(f"{counts['kills']} kills, {counts['finished']} runs finished, {counts['lost']} lost")


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
