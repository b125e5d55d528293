"""The section on training: scores of the layers and losses over the steps."""

import base64
import html
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from linvideo_jax.report.charts import Line, heatmap, lines, smooth, thinned

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
    "generator_loss": "Loss of the generator (DMD2); its size says little",
    "regression": "Squared distance to the teacher's samples, of the first step in the start",
    "sample_deviation": "Standard deviation of the generator's samples",
    "exit_step": "Step of the sampling that was trained (from 0)",
    "gradient_norm": "Gradient norm",
    "fake_gradient_norm": "Gradient norm of the fake score",
    "seconds_per_step": "Seconds a step",
    "attention_errors": "Error of each layer's linear attention, while the maps are fitted",
}


# Of every line; in words elsewhere.
_NOT_DRAWN = ("step", "time", "r", "forwards")


def section(
    log: Sequence[dict[str, Any]],
    facts: Mapping[str, Any],
    linear: Sequence[int],
    samples: Sequence[tuple[int, bytes]] = (),
) -> str:
    """Panels of every figure in the transfer's log; r by layer first.

    facts: of `stages.monitoring.write_facts`; linear: the layers that are linear, or are to be if
    nothing changes; samples: (step, webp file) of contact sheets.
    """
    marks = [(step, word) for step, word in facts.get("marks", ())]
    lines_only = [(step, "") for step, _ in marks]
    r = [line for line in log if "r" in line]
    parts = [_note(log)]
    if r:
        parts.append("<h3>r of each layer</h3>")
        for size, classes in (((1040, 280), "wide"), ((340, 240), "narrow")):
            parts.append(_layers(log, "r", linear, marks, size, classes, (0.0, 1.0)))
        parts.append(_picture(r))
    keys = dict.fromkeys(key for line in log for key in line)
    keys = [*_NAMES, *(key for key in keys if key not in _NAMES)]
    panels = [_saved(r, facts, lines_only)] if r and "flops_saved_a_layer" in facts else []
    for key in keys:
        values = [line[key] for line in log if key in line]
        if key in _NOT_DRAWN or len(values) < 2:
            continue
        if isinstance(values[0], list):
            panel = _layers(log, key, linear, lines_only, (340, 190), "")
        else:
            panel = _scalar(log, key, lines_only)
        panels.append(_panel(_NAMES.get(key, key), panel))
    parts.append(f'<div class="panels">{"".join(panels)}</div>')
    heading = "Training: r and losses" if r else "Training: losses"
    return (
        f'<section id="training"><h2>{heading}</h2>{"".join(parts)}</section>\n{_samples(samples)}'
    )


def seconds_left(log: Sequence[dict[str, Any]], num_steps: int) -> float | None:
    """Of the steps that are to come, at the pace of the last ten lines; None: not known."""
    paces = [line["seconds_per_step"] for line in log[-10:] if "seconds_per_step" in line]
    return (num_steps - log[-1]["step"]) * median(paces) if paces else None


def saved_shares(r: Sequence[float], facts: Mapping[str, Any]) -> tuple[float, float]:
    """(of self-attention's, of all) FLOPs that a forward saves with the scores rounded now."""
    linear = sum(score < 0.5 for score in r)
    return linear * facts["attention_saved_a_layer"], linear * facts["flops_saved_a_layer"]


def _note(log):
    minutes = (log[-1]["time"] - log[0]["time"]) / 60 if "time" in log[0] else 0
    forwards = [line["forwards"] for line in log if "forwards" in line]
    count = (
        f" An update costs as much as {forwards[-1]:.3g} forwards a sample, a backward pass "
        "counted as two."
        if forwards
        else ""
    )
    legend = (
        " r is the share of softmax in a layer's attention: at 1 it is all softmax, at 0 all "
        'linear. <span style="color:var(--linear)">Green</span> are the layers that became linear.'
    )
    return (
        f"<p>{log[-1]['step']:,} updates in {minutes:.1f} minutes{_pace(log)}.{count}"
        f"{legend if any('r' in line for line in log) else ''}</p>"
    )


def _pace(log):
    paces = [line["seconds_per_step"] for line in log if "seconds_per_step" in line]
    return f", {median(paces):.3g} s each (the median)" if paces else ""


def _panel(heading, chart):
    return f"<div><h3>{html.escape(heading)}</h3>{chart}</div>"


def _picture(r):
    steps = [line["step"] for line in r]
    layers = [
        thinned(steps, [line["r"][layer] for line in r])[1] for layer in range(len(r[0]["r"]))
    ]
    picture = heatmap(layers, (steps[0], steps[-1]), "r by layer (down) and step (across)")
    words = "The same as a picture: a row a layer, the input's on top; green is linear."
    return f'{picture}<p class="note">{words}</p>'


def _saved(r, facts, marks):
    steps, shares = [line["step"] for line in r], [saved_shares(line["r"], facts) for line in r]
    curves = []
    for name, kind, values in zip(
        ("self-attention", "all"), ("linear", "softmax"), zip(*shares, strict=True), strict=True
    ):
        x, y = thinned(steps, values)
        curves.append(Line(x, y, kind, f"of {name}"))
    title = "Share of FLOPs saved with the scores rounded now"
    attention, everything = shares[-1]
    note = (
        f'<p class="note"><span style="color:var(--linear)">Green</span>: of self-attention, now '
        f"{attention:.1%}; grey: of all, {everything:.1%}. Counted, not measured.</p>"
    )
    return _panel(title, lines(curves, title, y_range=(0.0, 1.0), marks=marks) + note)


def _samples(samples):
    if not samples:
        return ""
    figures = "".join(
        f'<figure class="sheet"><img alt="Samples after step {step}" '
        f'src="data:image/webp;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption><b>step {step:,}</b></figcaption></figure>"
        for step, data in reversed(samples)
    )
    return (
        '<section id="samples"><h2>Samples on the way</h2><p>The teacher above, the student below, '
        "from the same noise; mixed layers are mixed as they were. The newest first.</p>"
        f"{figures}</section>\n"
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
