"""The table of a sweep: table.json, and table.md for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linvideo_jax import loop
from linvideo_jax.evaluation import TEACHER
from linvideo_jax.folders import replacing
from linvideo_jax.provenance import made_here
from linvideo_jax.report import rows as records
from linvideo_jax.report.page import title_of

Table = dict[str, Any]

# Of a row's record: where the figure is, its heading, factor and format.
COLUMNS = (
    (("figures", "right.all"), "all right, %", 100, ".1f"),
    (("figures", "right.digit"), "digit, %", 100, ".1f"),
    (("figures", "frechet"), "Frechet", 1, ".2f"),
    (("figures", "diversity"), "diversity, % of the teacher's", 100, ".1f"),
    (("figures", "motion.dynamic_degree"), "dynamic degree, %", 100, ".1f"),
    (("figures", "motion.shape_correlation"), "shape correlation", 1, ".3f"),
    (("figures", "motion.path_deviation"), "path deviation, px", 1, ".2f"),
    (("figures", "distance_video"), "distance to the teacher, pixels", 1, ".3f"),
    (("figures", "distance_latents"), "latents", 1, ".3f"),
    (("losses", "velocity"), "velocity error", 1, ".3g"),
    (("selection", "rounded"), "linear by rounding", 1, ".1f"),
    (("selection", "undecided"), "scores undecided", 1, ".1f"),
    (("forwards", "total"), "forwards an update", 1, ".3g"),
    (("updates_per_second", "mixed"), "updates a second, mixed", 1, ".1f"),
    (("updates_per_second", "rounded"), "rounded", 1, ".1f"),
    (("updates_per_second", "distill"), "updates a second", 1, ".1f"),
)


def write(config, workdir: Path) -> Path:
    """Writes WORKDIR/table.json and table.md of the rows as far as they are; the latter's path."""
    workdir = Path(workdir)
    table = gathered(config, workdir)
    loop.write_json(workdir / "table.json", table)
    path = workdir / "table.md"
    with replacing(path) as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    return path


def gathered(config, workdir: Path) -> Table:
    """All rows of the sweep in its order, each with the records of its seeds, those not run too."""
    found = {}
    for name, changes in config.sweep:
        runs = map(records.read, Path(workdir).glob(f"rows/{name}/seed*"))
        runs = sorted(filter(None, runs), key=lambda run: run["seed"])
        found[name] = {"changes": dict(changes), "runs": runs}
    return {
        "made": made_here(),
        "seeds": list(config.sweep_seeds),
        "rows": found,
    }


def markdown(table: Table, columns: Sequence[Any] = COLUMNS) -> str:
    """A table of the rows, the mean over training seeds and its spread, and the teacher first.

    The spread, after ±, is the sample standard deviation. Columns without a figure are left out.
    """
    runs = [run for row in table["rows"].values() for run in row["runs"]]
    shown = [
        column for column in columns if any(_figure(run, column[0]) is not None for run in runs)
    ]
    lines = [["", *(heading for _, heading, _, _ in shown)]]
    for name, teacher in _teachers(runs).items():
        lines.append([name, *(_cell([{"figures": teacher}], column) for column in shown)])
    for name, row in table["rows"].items():
        cells = [_cell(row["runs"], column) for column in shown]
        lines.append([name + _note(row["runs"], table["seeds"]), *cells])
    rule = ["---"] * len(lines[0])
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return f"{text}\n"


def finished(table: Table, before: Table | None = None) -> Table:
    """The table's finished and diverged rows for docs/results, and those of `before` it lacks.

    Its seeds are those of all rows, which may come from several commands.
    """
    rows = {} if before is None else dict(before["rows"])
    for name, row in table["rows"].items():
        done = [run for run in row["runs"] if run["status"] != "begun"]
        seeds = {run["seed"] for run in done}
        kept = [run for run in rows.get(name, {}).get("runs", []) if run["seed"] not in seeds]
        runs = sorted([*done, *kept], key=lambda run: run["seed"])
        rows[name] = {"changes": row["changes"], "runs": runs}
    measured = {run["seed"] for row in rows.values() for run in row["runs"]}
    return table | {"rows": rows, "seeds": sorted(measured.union(table["seeds"]))}


def of_run(metrics: dict[str, Any]) -> Table:
    """A plain run's contenders as rows, for docs/results; without its configuration."""
    made = {key: value for key, value in metrics["made"].items() if key != "config"}
    rows = {}
    for name, entry in metrics["contenders"].items():
        run = {"name": name, "seed": metrics["made"]["config"]["seed"], "status": "measured"}
        run |= {"figures": records.figures(entry), "linear_layers": entry["linear_layers"]}
        run["made"] = made
        rows[name] = {"changes": {}, "runs": [run]}
    shares = {name: student["gap_closed"] for name, student in metrics["students"].items()}
    return {"made": made, "seeds": [metrics["made"]["config"]["seed"]], "rows": rows,
            "gap_closed": shares}  # fmt: skip


def has_training(table: Table) -> bool:
    """Whether it is a sweep's, and not of a plain run alone."""
    return any(run["status"] != "measured" for row in table["rows"].values() for run in row["runs"])


def joined(sweep: Table, run: Table) -> Table:
    """A sweep's table, and behind it the models of a plain run, all but the teacher."""
    models = {name: row for name, row in run["rows"].items() if name != TEACHER}
    return sweep | {"rows": sweep["rows"] | models}


def view(table: Table, which: str = "") -> str:
    """Markdown of a table of docs/results. "summary": a run's in one line, as README has it."""
    if which == "summary":
        return summary(table)
    profiles = [run for row in table["rows"].values() for run in row["runs"] if "profile" in run]
    parts = [markdown(table)] if len(profiles) < len(table["rows"]) else []
    parts += map(_profile, profiles)
    parts += [_agreement(target, found) for target, found in table.get("agreement", {}).items()]
    runs = [run for row in table["rows"].values() for run in row["runs"]]
    made = [run["made"] for run in runs if "made" in run] or [table["made"]]
    # Pieces of one table may have been made by several commands.
    where = {f"`{one['command']}`; {one['device']}, JAX {one['jax']}": one["time"] for one in made}
    parts += [f"{what}, {time}.\n" for what, time in where.items()]
    return "\n".join(parts)


def _profile(run: dict[str, Any]) -> str:
    """A row's profile: a line for each range of layers."""
    shown = [
        ("error_before", "error before"),
        ("error_after", "after recovery"),
        ("all_right", "all right"),
        ("distance_latents", "distance to the teacher, latents"),
    ]
    shown = [(key, heading) for key, heading in shown if key in run["profile"]["rows"][0]]
    lines = [[run["name"], *(heading for _, heading in shown)], ["---"] * (len(shown) + 1)]
    for row in run["profile"]["rows"]:
        first, last_one = row["layers"][0], row["layers"][-1]
        name = f"{first}" if first == last_one else f"{first} to {last_one}"
        lines.append([name, *(f"{row[key]:.3g}" for key, _ in shown)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _agreement(target: str, found: dict[str, float]) -> str:
    """What `chosen.agreement` found for the runs with this many linear layers."""
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in found.items())
    return f"Layers in common where scores chose {target}: {told}.\n"


def summary(table: Table) -> str:
    """Share of a run's videos with everything right, by model, and the gap that it closed."""
    rates = {name: row["runs"][0]["figures"]["right.all"] for name, row in table["rows"].items()}
    cells = {title_of(name): f"{100 * rate:.1f}%" for name, rate in rates.items()}
    cells["gap closed"] = ", ".join(f"{share:.2f}" for share in table["gap_closed"].values())
    lines = (cells, ["---"] * len(cells), cells.values())
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _teachers(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The teacher's figures, once for each way of evaluating, by what tells these ways apart."""
    different = {run["evaluated_by"]: run for run in runs if "teacher" in run}
    settings = {by: run.get("made", {}).get("settings", {}) for by, run in different.items()}
    named = {}
    for by, run in different.items():
        told = [
            f"{key.replace('_', ' ')} {value}"
            for key, value in settings[by].items()
            if any(other.get(key) != value for other in settings.values())
        ]
        named[", ".join(["teacher", *told])] = run["teacher"]
    return named


def _figure(run: dict[str, Any], path: tuple[str, str]) -> float | None:
    group, name = path
    return run.get(group, {}).get(name)


def _cell(runs: list[dict[str, Any]], column) -> str:
    path, _, factor, form = column
    values = [_figure(run, path) for run in runs]
    values = [factor * value for value in values if value is not None]
    if not values:
        return ""
    mean = format(float(np.mean(values)), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(float(np.std(values, ddof=1)), form)}"


def _note(runs: list[dict[str, Any]], seeds: list[int]) -> str:
    """What of a row is not as it should be: not run, begun, diverged, or fewer seeds.

    A row of a plain run ("measured") has no seeds of training.
    """
    if any(run["status"] == "measured" for run in runs):
        return ""
    done = [run for run in runs if run["status"] == "trained"]
    notes = [
        f"seed {run['seed']} diverged at step {run['diverged_at']}"
        for run in runs
        if run["status"] == "diverged"
    ]
    missing = len(seeds) - len(done) - len(notes)
    if missing >= len(seeds):
        notes.append("not run")
    elif missing > 0:
        notes.append(f"{missing} of {len(seeds)} seeds not run")
    return f" ({', '.join(notes)})" if notes else ""
