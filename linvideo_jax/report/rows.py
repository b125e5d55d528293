"""What is kept of a row of a sweep, `row.json`: its figures, read from the files of its run."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from linvideo_jax import loop
from linvideo_jax.evaluation import STUDENT, TEACHER

FILE = "row.json"
TRAINING = ("transfer", "distill")  # stages that make a row's student


def read(folder: Path) -> dict[str, Any] | None:
    """A row's record; None if it was never begun."""
    path = Path(folder) / FILE
    return loop.read_json(path) if path.exists() else None


def trained(config, folder: Path) -> dict[str, Any]:
    """Of a finished training: forwards, times, final losses, the selection, and the profile."""
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    for stage in TRAINING:
        log = loop.read_metrics(Path(folder) / "state" / stage)
        if not log:
            continue
        record |= times(log) | {"losses": last(log)}
        if stage == "transfer":
            record["forwards"] = {"total": [x["forwards"] for x in log if "forwards" in x][-1]}
    for name in ("selection", "profile"):
        path = Path(folder) / f"{name}.json"
        path = path if path.exists() else Path(folder) / name / f"{name}.json"
        if path.exists() and not path.parent.is_symlink():
            record[name] = loop.read_json(path)
    return record


def times(log: list[dict[str, Any]]) -> dict[str, Any]:
    """updates_per_second while maps are fitted, layers are mixed, and none is, or of the
    distillation; and training_seconds of all updates, both by the median of the log's lines, so
    that no compilation counts.
    """
    rates, seconds = {}, 0.0
    for name in ("warmup", "mixed", "rounded", "distill"):
        steps = [line["seconds_per_step"] for line in log if _part(line) == name]
        if steps:
            rates[name] = 1 / float(np.median(steps))
            seconds += len(steps) / len(log) * log[-1]["step"] / rates[name]
    return {"updates_per_second": rates, "training_seconds": seconds}


def _part(line: dict[str, Any]) -> str:
    if "fake_gradient_norm" in line:
        return "distill"
    if "mixed_layers" not in line:
        return "warmup"
    return "mixed" if line["mixed_layers"] else "rounded"


def last(log: list[dict[str, Any]]) -> dict[str, float]:
    """Each scalar in the log, the mean over its last tenth."""
    lines = log[-max(1, len(log) // 10) :]
    skip = ("time", "seconds_per_step", "forwards")
    scalars = [k for k, v in lines[-1].items() if isinstance(v, float) and k not in skip]
    means = {key: float(np.mean([line[key] for line in lines if key in line])) for key in scalars}
    for name in ("anchor", "mse"):  # both are the error of the velocity on stored pairs
        if name in means:
            means["velocity"] = means[name]
    return means


def evaluated(folder: Path) -> dict[str, Any]:
    """Of an evaluation: the student's figures and the teacher's."""
    metrics = loop.read_json(Path(folder) / "evaluate" / "metrics.json")
    entries = metrics["contenders"]
    record = {"teacher": figures(entries[TEACHER])}
    if STUDENT in entries:
        record["figures"] = figures(entries[STUDENT])
        record["linear_layers"] = entries[STUDENT]["linear_layers"]
    return record | {"made": {k: v for k, v in metrics["made"].items() if k != "config"}}


def figures(entry: dict[str, Any]) -> dict[str, float]:
    """A contender's figures by name: right.all and the other shares, distances, motion, quality."""
    found = {f"right.{name}": value["rate"] for name, value in entry.get("agreement", {}).items()}
    skip = ("num_layers", "tokens")
    numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k not in skip}
    return found | {k: v for k, v in numbers.items() if not isinstance(v, bool)}
