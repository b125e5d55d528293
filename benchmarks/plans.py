"""The table of plans in docs/pods.md: the configurations of real Wan on several machines.

JAX_PLATFORMS=cpu python benchmarks/plans.py --out=runs/plans.json

Each plan is compiled twice, 1 to 8 minutes of two cores, and needs
`pip install -e ".[tpu]"`. What is in --out already is not compiled again; the table is printed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linvideo_jax import command_line, config_files
from linvideo_jax.errors import UserError
from linvideo_jax.loop import read_json, write_json
from linvideo_jax.plan import page, planned
from linvideo_jax.plan.chips import GIB
from linvideo_jax.plan.planned import Plan

FLAGS = {
    "out": (None, "JSON file of the plans"),
    "only": (None, "machine, such as v5p:4x4x4; none: all"),
}
PLANS = (
    ("configs/wan14b.py", "v5p:4x4x4"),
    ("configs/wan14b.py", "v6e:8x8"),
    ("configs/wan14b.py", "v5e:8x8"),
    (
        "configs/wan14b.py", "v5e:8x8",
        "--config.mesh.context=16", "--config.transfer.batch_size=4",
    ),
    ("configs/wan14b.py", "h100:32"),
    ("configs/wan1_3b.py", "v5e:4x4"),
    ("configs/wan1_3b.py", "v6e:2x4"),
    ("configs/wan1_3b.py", "v5p:2x2x2"),
    ("configs/wan1_3b.py", "h100:8"),
    ("configs/wan14b_dmd2.py", "v5p:4x4x4"),
    ("configs/wan14b_dmd2.py", "h100:64"),
    ("configs/wan1_3b_dmd2.py", "v5p:2x2x2"),
    ("configs/wan1_3b_dmd2.py", "h100:8"),
)  # fmt: skip
DAY = 86_400  # s


def row(plan: Plan) -> dict[str, Any]:
    """What the table shows of a plan, and its page."""
    slow = max(plan.phases, key=lambda phase: phase.work.total)
    sent = plan.sent.get(slow.sent)
    return {
        "mesh": plan.sizes,
        "batch_size": plan.chosen.batch_size,
        "held": plan.chosen.kept,
        "peak": plan.peak,
        "limit": plan.limit,
        "by_formula": plan.formula is not None,
        "formula": sum(plan.estimate.values()),
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "flops": slow.work.total / plan.machine.num_chips,
        "sent": sent.sent if sent else None,
        "step": plan.update_seconds[slow.name],
        "training": plan.training_seconds,
        "collection": plan.collection_seconds,
        "kernels": plan.chosen.kernels,
        "compile_seconds": plan.chosen.seconds,
        "page": page.text(plan),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    head = ("configuration, machine", "mesh", "batch", "kept, GiB", "peak, GiB", "of", "fits")
    head += ("largest batch", "TFLOP a chip", "sent, GiB", "update, s", "training, days")
    lines = ["| " + " | ".join((*head, "collect, days")) + " |", "|---" * 13 + "|"]
    for name, one in rows.items():
        sent = "" if one["sent"] is None else f"{one['sent'] / GIB:,.1f}"
        cells = (
            name.replace("--config.", ""),
            " x ".join(str(size) for size in one["mesh"].values()),
            one["batch_size"],
            f"{one['held'] / GIB:.1f}",
            f"{one['peak'] / GIB:.1f}" + "*" * one["by_formula"],
            f"{one['limit'] / GIB:.1f}",
            "yes" if one["fits"] else "no",
            "" if one["largest_batch"] is None else one["largest_batch"] or "none",
            f"{one['flops'] / 1e12:,.0f}",
            sent,
            _range(one["step"], 1),
            _range(one["training"], DAY),
            "" if one["collection"] is None else _range(one["collection"], DAY),
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _range(seconds: Sequence[float], unit: float) -> str:
    """Both ends to two digits."""
    return " to ".join(f"{float(f'{value / unit:.2g}'):g}" for value in seconds)


def plans(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "out")
    machines = sorted({machine for _, machine, *_ in PLANS})
    if given["only"] and given["only"] not in machines:
        raise UserError(f"--only={given['only']}: choose one of {', '.join(machines)}.")
    out = Path(given["out"])
    rows = read_json(out) if out.exists() else {}
    for path, machine, *overrides in PLANS:
        name = " ".join([Path(path).stem, machine, *overrides])
        if name in rows or (given["only"] and machine != given["only"]):
            continue
        config = config_files.override(config_files.load(path), overrides)
        rows[name] = row(planned.make(config, machine))
        print(rows[name]["page"], end="\n\n", flush=True)
        write_json(out, rows)
    names = (" ".join([Path(path).stem, *rest]) for path, *rest in PLANS)
    print(table({name: rows[name] for name in names if name in rows}))


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(plans, argv, "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
