"""The tables of two_gpus.py, from its JSON."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import GIB
from linvideo_jax import folders


def write(results: Mapping[str, Any], out: Path) -> None:
    """Prints the tables, and writes OUT.md."""
    words = markdown(results)
    print(words)
    with folders.replacing(out.with_suffix(".md")) as temporary:
        temporary.write_text(words + "\n", encoding="utf-8")


def markdown(results: Mapping[str, Any]) -> str:
    """All tables that were measured, and what failed."""
    parts, where = results["parts"], results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [f"2 x {where['device']}; {versions}."]
    nccl = [f"{name}={value}" for name, value in where["nccl"].items()]
    if where["xla_flags"] or nccl:
        lines += ["", "; ".join([f"XLA_FLAGS {where['xla_flags']}", *nccl])]
    done = {name: part for name, part in parts.items() if "error" not in part}
    if "equality" in done:
        lines += _table(
            "{size}, {blocks} layers, {linear} linear, {tokens:,} tokens: relative L2 error of a "
            "forward | to one GPU | to float32".format(**done["equality"]),
            _equality(done["equality"]),
        )
    if "gradients" in done:
        lines += _table(
            "{blocks} blocks, {tokens:,} tokens, batch 2: relative L2 error of ADM's gradients | "
            "weights | feature maps | scores".format(**done["gradients"]),
            _gradients(done["gradients"]),
        )
    speeds = [done[name] for name in ("speed_1.3b", "speed_14b") if name in done]
    if speeds:
        lines += _table(
            "one forward, batch 1 | one GPU | two GPUs | speed-up | collectives, ms | alone, ms",
            (row for part in speeds for row in _speed(part)),
        )
    if "bytes" in done:
        lines += _table(
            "a layer's attention: sent by each of two GPUs | XLA's program, MB | formula, MB | by",
            _layers(done["bytes"]),
        )
        lines += ["", *_rest(done["bytes"])]
    updates = [done[name] for name in ("train_one", "train_fsdp") if name in done]
    if updates:
        lines += _table(
            "an update with ADM, every layer mixed | batch | seconds | seconds a sample | "
            "memory a GPU, GiB | MFU",
            map(_update, updates),
        )
    failed = {name: part["error"] for name, part in parts.items() if "error" in part}
    lines += [f"\nNot measured: {name} ({error})." for name, error in failed.items()]
    return "\n".join(lines)


def _table(head: str, rows: Iterator[Sequence[str]]) -> list[str]:
    line = "|---" * (head.count("|") + 1) + "|"
    return ["", f"| {head} |", line, *(f"| {' | '.join(row)} |" for row in rows)]


def _equality(part: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, exactly in part["to_float32"].items():
        if name != "float32":
            one = part["to_one"].get(name)
            yield name, "" if one is None else f"{one:.2g}", f"{exactly:.2g}"


def _gradients(part: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    rows = {f"{name} to one GPU": errors for name, errors in part["to_one"].items()}
    for name, errors in (rows | {"one GPU to float32": part["to_float32"]}).items():
        yield name, *(f"{errors[key]:.2g}" for key in ("weights", "feature maps", "scores"))


def _speed(part: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, row in part["rows"].items():
        gpus = row["collectives"]
        # The GPU that comes last does not wait: its time is the exchange's.
        times = [f"{min(gpu[key] for gpu in gpus):.1f}" if gpus else "no GPU in the profile"
                 for key in ("milliseconds", "alone_milliseconds")]  # fmt: skip
        seconds = (f"{row[key]['seconds']:.3g} s" for key in ("one", "two"))
        about = f"{part['size']}, {part['tokens']:,} tokens: {name}"
        yield about, *seconds, f"{row['speed_up']:.2f}", *times


def _layers(part: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, row in part["layers"].items():
        sent = (f"{row[key] / 1e6:.3f}" for key in ("measured", "formula"))
        yield f"{name}, {row['tokens']:,} tokens", *sent, ", ".join(row["kinds"])


def _rest(part: Mapping[str, Any]) -> Iterator[str]:
    for name, kinds in part["rest_of_a_forward"].items():
        sent = ", ".join(f"{value / 1e6:,.1f} MB by {kind}" for kind, value in kinds.items())
        yield f"The rest of a forward of {name}, above all weights: {sent or 'nothing'}."


def _update(row: Mapping[str, Any]) -> Sequence[str]:
    seconds = float(np.median(row["seconds"]))
    mesh = ", ".join(f"{axis}:{size}" for axis, size in row["mesh"].items() if size > 1)
    return (
        f"{row['model']}, {row['tokens']:,} tokens, {mesh or 'one GPU'}",
        str(row["batch_size"]),
        f"{seconds:.3g}",
        f"{seconds / row['batch_size']:.3g}",
        f"{row['memory'] / GIB:.1f}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
    )
