"""The section on training: scores of the layers and losses over the steps."""

import html
from collections.abc import Sequence
from typing import Any

from linvideo_jax.evaluation import STUDENT
from linvideo_jax.report.charts import Line, lines, smooth, thinned

_NAMES = {
    "loss": "Loss",
    "adm": "Distribution matching (ADM)",
    "adm_score": "ADM with a score network",
    "dmd": "Distribution matching at t = 0 (DMD)",
    "score_loss": "Loss of the score network",
    "mse": "Velocity error on stored pairs",
    "own_points": "Velocity error on stored pairs and own points",
    "anchor": "Velocity anchor",
    "constraint": "Constraint on the number of linear layers",
    "regulariser": "Regulariser of r",
    "alpha": "alpha, the regulariser's sharpness",
    "mixed_layers": "Layers still mixed",
    "gradient_norm": "Gradient norm",
    "attention_errors": "Error of each layer's linear attention, while the maps are fitted",
}


def section(log: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """Panels of every figure in the transfer's log; r by layer first."""
    settings = metrics["made"]["config"].get("transfer", {})
    marks = [
        (settings[name], word)
        for name, word in (("warmup_steps", "maps fitted"), ("round_at", "rounded"))
        if name in settings
    ]
    lines_only = [(step, "") for step, _ in marks]
    linear = metrics["contenders"][STUDENT]["linear_layers"]
    minutes = (log[-1]["time"] - log[0]["time"]) / 60 if "time" in log[0] else 0
    note = (
        f"<p>{log[-1]['step']:,} updates in {minutes:.1f} minutes. r is the share of softmax in a "
        "layer's attention: at 1 it is all softmax, at 0 all linear. "
        '<span style="color:var(--linear)">Green</span> are the layers that became linear.</p>'
    )
    parts = []
    if any("r" in line for line in log):
        for size, classes in (((1040, 280), "wide"), ((340, 240), "narrow")):
            parts.append(_layers(log, "r", linear, marks, size, classes, (0.0, 1.0)))
    keys = dict.fromkeys(key for line in log for key in line)
    keys = [*_NAMES, *(key for key in keys if key not in _NAMES)]
    panels = []
    for key in keys:
        values = [line[key] for line in log if key in line]
        if key in ("step", "time", "r") or len(values) < 2:
            continue
        if isinstance(values[0], list):
            panel = _layers(log, key, linear, lines_only, (340, 190), "")
        else:
            panel = _scalar(log, key, lines_only)
        panels.append(f"<div><h3>{html.escape(_NAMES.get(key, key))}</h3>{panel}</div>")
    return (
        f'<section id="training"><h2>Training: r and losses</h2>{note}<h3>r of each layer</h3>'
        f'{"".join(parts)}<div class="panels">{"".join(panels)}</div></section>\n'
    )


def _scalar(log, key, marks):
    found = [line for line in log if key in line]
    x, y = thinned([line["step"] for line in found], [line[key] for line in found])
    curves = [Line(x, y, "raw", key), Line(x, smooth(y), "", f"{key}, running mean")]
    return lines(curves, f"{key} over the steps", marks=marks)


def _layers(log, key, linear, marks, size, classes, y_range=None):
    found = [line for line in log if key in line]
    steps = [line["step"] for line in found]
    curves = []
    # Softmax layers first: what became linear lies on top.
    layers = range(len(found[0][key]))
    for layer in sorted(layers, key=lambda layer: layer in linear):
        x, y = thinned(steps, [line[key][layer] for line in found])
        kind = "linear" if layer in linear else "softmax"
        curves.append(Line(x, y, kind, f"layer {layer}, {kind}"))
    return lines(curves, f"{key} of each layer over the steps", size, y_range, marks, classes)
