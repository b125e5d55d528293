"""report.html of a run: one file that opens offline, made from what the run's folder holds."""

from pathlib import Path
from typing import Any

from linvideo_jax import loop
from linvideo_jax.evaluation import TEACHER
from linvideo_jax.folders import replacing
from linvideo_jax.report import page, running


def write(workdir: Path) -> Path:
    """Writes WORKDIR/report.html from what is there, whole or not at all.

    Of a run that is not evaluated, or is trained on since, that is its training so far. UserError
    if neither the evaluate stage nor transfer or distill has left anything.
    """
    workdir = Path(workdir)
    stages = [workdir / "state" / stage for stage in ("distill", "transfer")]
    state = next((folder for folder in stages if folder.exists()), stages[-1])
    evaluated = workdir / "evaluate" / "metrics.json"
    log = loop.read_metrics(state)
    facts = loop.read_json(state / "facts.json") if (state / "facts.json").exists() else {}
    samples = [
        (int(path.stem), path.read_bytes()) for path in sorted((state / "samples").glob("*.webp"))
    ]
    trains = log and log[-1]["step"] < facts.get("num_steps", 0)
    path = workdir / "report.html"
    if log and (trains or not evaluated.exists()):
        settings = workdir / "config.json"
        config = loop.read_json(settings) if settings.exists() else {}
        text = running.build(log, facts, samples, config, workdir)
    else:
        metrics = loop.read_json(evaluated)
        clips = {
            entry["file"]: (workdir / "evaluate" / entry["file"]).read_bytes()
            for shown in metrics["shown"]
            for entry in shown["videos"].values()
        }
        text = page.build(metrics, log, facts, samples, clips, workdir)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def text(metrics: dict[str, Any]) -> str:
    """Agreement beside the judge's ceiling, and the gaps that the students closed, as text."""
    if not metrics["contenders"][TEACHER]["agreement"]:
        return _likeness(metrics)
    ceiling = metrics["ceiling"]
    names = list(metrics["contenders"][TEACHER]["agreement"])
    names = ["all", *(name for name in names if name != "all")]
    rows = [["agreement with the prompt, %", *names]]
    for name, entry in metrics["contenders"].items():
        rates = entry["agreement"]
        rows.append([page.title_of(name), *(f"{100 * rates[key]['rate']:.1f}" for key in names)])
    if ceiling:
        rows.append(["ceiling of the classifier", *(f"{100 * ceiling[key]:.1f}" for key in names)])
    return "\n".join(
        [*_aligned(rows), *(page.closed(name, s) for name, s in metrics["students"].items())]
    )


def _likeness(metrics):
    keys = ("psnr", "ssim", "distance_latents", "motion.smoothness", "motion.dynamic_degree")
    rows = [["against the teacher's videos", *keys]]
    for name, entry in metrics["contenders"].items():
        figures = ("" if entry[key] is None else f"{entry[key]:.3f}" for key in keys)
        rows.append([page.title_of(name), *figures])
    return "\n".join(_aligned(rows))


def _aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
