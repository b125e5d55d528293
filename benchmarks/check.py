"""Compares two results of latency.py or full_size.py, of the same GPU: ratios of seconds.

python benchmarks/check.py --new=runs/latency.json --stored=docs/results/latency_before.json

Ends with 1 if a median is longer than --tolerance allows, or a part of the stored file failed.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from absl import flags

from benchmarks import measure
from linvideo_jax import command_line
from linvideo_jax.errors import UserError

FLAGS = {"new": (None, "JSON of this run"), "stored": (None, "JSON to compare it with")}
# Of one measurement each, and of what is no work of ours: shown by the benchmarks, not compared.
LABELS = ("row", "tokens", "batch")  # what tells the entries of a list apart
ONCE = ("part_seconds", "made_seconds", "compile_seconds", "low", "high")


def seconds(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(where, seconds) of everything timed in a result."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "seconds" or (key not in ONCE and isinstance(inner, dict | list)):
                yield from seconds(inner, path if key == "seconds" else (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from seconds(inner, (*path, *(str(inner[k]) for k in LABELS if k in inner)))
    elif isinstance(value, int | float):
        yield " / ".join(path), float(value)


def program(argv: Sequence[str]) -> None:
    """The comparison; UserError for files that cannot be compared."""
    values = command_line.define(FLAGS)
    flags.DEFINE_float("tolerance", 0.1, "share by which a time may grow", 0, flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "new", "stored")
    new, stored = (measure.read(Path(given[name])) for name in ("new", "stored"))
    devices = [result["environment"]["device"] for result in (new, stored)]
    if devices[0] != devices[1] or new["small"] != stored["small"]:
        raise UserError(
            f"{given['new']} is of {devices[0]}, {given['stored']} of {devices[1]} or of another "
            "size: compare results of one device."
        )
    failed = [
        part
        for part, figures in new["parts"].items()
        if "error" in figures and "error" not in stored["parts"].get(part, {"error": ""})
    ]
    before, after = dict(seconds(stored["parts"])), dict(seconds(new["parts"]))
    slower = []
    for name in before.keys() & after.keys():
        if after[name] > (1 + values.tolerance) * before[name]:
            slower.append(name)
    for name in sorted(before.keys() & after.keys()):
        mark = "  slower" if name in slower else ""
        print(f"{after[name] / before[name]:6.2f}  {before[name]:.4g} s  {name}{mark}")
    if not before.keys() & after.keys():
        raise UserError("the two files have no part in common.")
    for part in failed:
        print(f"{part} failed: {new['parts'][part]['error']}")
    if slower or failed:
        raise SystemExit(1)


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
