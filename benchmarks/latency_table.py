"""The table and the pictures of latency.py, from its JSON.

python benchmarks/latency_table.py --results=runs/latency.json

latency.py does it itself; this is for pictures of results that came from another machine.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from linvideo_jax import command_line, folders, loop

KINDS = {"LinVideo": "after", "all linear": "before"}


def write(results: Mapping[str, Any], out: Path) -> None:
    """Prints the table, and writes OUT.md, OUT.svg and OUT-scaling.svg as far as measured."""
    words = "\n".join(markdown(results))
    print(words)
    _replace(out.with_suffix(".md"), words + "\n")
    try:
        _draw(_measured(results), out)
    except ImportError as error:  # of what the reports need, on a bare GPU machine
        print(f"no pictures, since {error.name} is not installed: draw them elsewhere, with")
        print(f"python benchmarks/latency_table.py --results={out}")


def _draw(parts: Mapping[str, Any], out: Path) -> None:
    from linvideo_jax.report import charts, style

    rows = [
        (f"{part['size']}: {name}", row["seconds"] / part["rows"]["dense"]["seconds"], row, name)
        for key, part in parts.items()
        if key.startswith("forward_")
        for name, row in part["rows"].items()
    ]
    if rows:
        lengths = [
            (label, share, _seconds(row["seconds"]), KINDS.get(name, "teacher"))
            for label, share, row, name in rows
        ]
        title = "One forward, relative to the dense one of the same size"
        _replace(out.with_suffix(".svg"), charts.alone(charts.bars(lengths, title), style.CSS))
    if "scaling" in parts:
        picture = charts.alone(_scaling(parts["scaling"]["points"]), style.CSS)
        _replace(out.with_name(f"{out.stem}-scaling.svg"), picture)


def markdown(results: Mapping[str, Any]) -> list[str]:
    """The tables' lines."""
    parts, where = _measured(results), results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [f"{where['device']}; {versions}.", ""]
    for part, figures in parts.items():
        if flags := figures.get("xla_flags"):
            lines += [f"{part}: XLA_FLAGS {flags}", ""]
    forwards = [part for key, part in parts.items() if key.startswith("forward_")]
    if forwards:
        lines += ["| one forward, batch 1 | median | lowest to highest | TFLOP/s | memory, GiB |"]
        lines += ["|---|---|---|---|---|"]
    for part in forwards:
        for name, row in part["rows"].items():
            lines.append(
                f"| {part['size']}, {part['blocks']} layers, {part['tokens']:,} tokens: {name} "
                f"| {_seconds(row['seconds'])} | {_seconds(row['low'])} to {_seconds(row['high'])} "
                f"| {row['tflop_per_second']:.0f} | {row['peak_bytes'] / 2**30:.1f} |"
            )
    estimates = prompt_to_mp4(parts)
    if estimates:
        lines += ["", "Prompt to mp4, from measured stages and steps (steps multiplied):", ""]
        lines += ["| | sampling | weights resident | and with turns on the device |", "|---|" * 4]
        lines[-1] = "|---|---|---|---|"
        for row in estimates:
            times = (row[key] for key in ("sampling", "resident", "turns"))
            lines.append(f"| {row['name']} | {' | '.join(_seconds(time) for time in times)} |")
    if "scaling" in parts:
        fitted = ", ".join(f"{k} {v:.2f}" for k, v in parts["scaling"]["exponents"].items())
        lines += ["", f"Exponent of time against tokens, over the three longest: {fitted}."]
    if "batch" in parts:
        lines += ["", "| videos in a forward | " + " | ".join(("row", "seconds a video")) + " |"]
        lines += ["|---|---|---|"]
        for point in parts["batch"]["points"]:
            known = "seconds_per_video" in point
            time = _seconds(point["seconds_per_video"]) if known else "memory ends"
            lines.append(f"| {point['batch']} | {point['row']} | {time} |")
    for key, part in parts.items():
        if key.startswith("profile_"):
            lines += _profile(part)
        if key.startswith("pace_"):
            lines += _pace(part)
    failed = {key: part["error"] for key, part in results["parts"].items() if "error" in part}
    return lines + [f"Not measured: {key} ({error})." for key, error in failed.items()]


def _profile(part: Mapping[str, Any]) -> list[str]:
    """Milliseconds by named scope, all rows; then LinVideo's slowest kernels."""
    rows = part["rows"]
    scopes = dict.fromkeys(scope for row in rows.values() for scope in row["scopes"])
    lines = [
        "",
        f"| {part['size']}: ms in | " + " | ".join(rows) + " |",
        "|---" * (1 + len(rows)) + "|",
    ]
    for scope in scopes:
        times = (f"{row['scopes'].get(scope, 0):.1f}" for row in rows.values())
        lines.append(f"| {scope} | {' | '.join(times)} |")
    lines += ["", f"| {part['size']}, LinVideo: slowest kernels | ms | share |", "|---|---|---|"]
    for kernel in rows["LinVideo"]["kernels"]:
        lines.append(
            f"| `{kernel['name']}` | {kernel['milliseconds']:.2f} | {kernel['share']:.1%} |"
        )
    return lines


def _pace(part: Mapping[str, Any]) -> list[str]:
    """Forwards in a row, and the GPU during each."""
    names = list(part["points"][0])
    lines = ["", f"| {part['size']}, forwards in a row | {' | '.join(names)} |"]
    lines += ["|---" * (1 + len(names)) + "|"]
    for number, point in enumerate(part["points"], 1):
        cells = (f"{point[name]:.{2 if name == 'seconds' else 0}f}" for name in names)
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return lines


def prompt_to_mp4(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of whole videos: text encoder, steps, decoding to a file; with turns, moves too.

    50 steps with guidance are 50 times one of the measured consecutive ones. The text encoder is
    the measured call for each of prompt and negative prompt.
    """
    if not {"stages", "mp4"} <= parts.keys():
        return []
    rows = parts["stages"]["rows"] | parts["mp4"]["rows"]
    stages = {name: row["seconds"] for name, row in rows.items()}
    found = []
    for key, part in parts.items():
        if not key.startswith("steps_"):
            continue
        size = part["size"]
        ends = _latents_to_mp4(stages, size)
        for name, row in part["rows"].items():
            few = name.endswith("4 steps")
            sampling = row["seconds"] if few else row["seconds"] / row["steps"] * 50
            name = f"{size}: {name if few else name.replace('guided', '50 steps with guidance')}"
            resident = sampling + ends + stages["text encoder"] * (1 if few else 2)
            moved = resident + stages[f"weights to the device, {size}"]
            found.append({"name": name, "sampling": sampling, "resident": resident, "turns": moved})
    return found


def _latents_to_mp4(stages: Mapping[str, float], size: str) -> float:
    """Decoding into the file; in older results, decoding and then writing."""
    if f"decode to mp4, {size}" in stages:
        return stages[f"decode to mp4, {size}"]
    return stages[f"VAE decode, bfloat16, {size}"] + stages[f"mp4, {size}"]


def exponents(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Slope of log seconds against log tokens, over the three longest of each row."""
    found = {}
    for row in dict.fromkeys(point["row"] for point in points):
        pairs = [(p["tokens"], p["seconds"]) for p in points if p["row"] == row and "seconds" in p]
        if len(pairs) >= 2:
            tokens, seconds = np.log(np.array(pairs[-3:])).T
            found[row] = float(np.polyfit(tokens, seconds, 1)[0])
    return found


def _scaling(points: Sequence[Mapping[str, Any]]) -> str:
    from linvideo_jax.report import charts

    curves = []
    for row in dict.fromkeys(point["row"] for point in points):
        known = [p for p in points if p["row"] == row and "seconds" in p]
        x, y = ([point[key] for point in known] for key in ("tokens", "seconds"))
        curves.append(charts.Line(x, y, KINDS.get(row, "teacher"), row))
    return charts.lines(curves, "Seconds of one forward against tokens", (560, 320), wide_x=True)


def _measured(results: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in results["parts"].items() if "error" not in part}


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _replace(path: Path, words: str) -> None:
    with folders.replacing(path) as temporary:
        temporary.write_text(words, encoding="utf-8")


def program(argv: Sequence[str]) -> None:
    """The table and pictures of a file; UserError if there is none."""
    values = command_line.define({"results": (None, "JSON of latency.py")})
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "results")
    write(loop.read_json(Path(given["results"])), Path(given["results"]))


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command starts anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
