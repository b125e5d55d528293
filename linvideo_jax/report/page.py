"""The page's sections, each a function from the figures of a run to HTML."""

import base64
import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linvideo_jax.evaluation import STUDENT, TEACHER
from linvideo_jax.metrics import flops
from linvideo_jax.models.wan import WanConfig
from linvideo_jax.report import training
from linvideo_jax.report.charts import intervals
from linvideo_jax.report.document import cards, document, section, values

Metrics = dict[str, Any]

_UNJUDGED = (
    " PSNR and SSIM are to the teacher's video of the same noise. Smoothness is 1 / (1 + mean "
    "change of motion in px), dynamic degree VBench's rule, both by block matching and so not "
    "comparable with VBench's own. All videos are in evaluate/vbench under the names that VBench "
    "looks for."
)

ATTRIBUTES = ("all", "digit", "colour", "direction", "speed", "bounce", "background")
# Wan2.1's two sizes of the paper, for the operations that the same share of layers saves there.
WAN_SIZES = (
    ("Wan2.1 1.3B, 81 frames of 480 x 832", WanConfig(), 32_760),
    (
        "Wan2.1 14B, 81 frames of 720 x 1280",
        replace(WanConfig(), num_attention_heads=40, ffn_dim=13_824, num_layers=40),
        75_600,
    ),
)


def build(
    metrics: Metrics,
    log: Sequence[dict[str, Any]],
    facts: Mapping[str, Any],
    samples: Sequence[tuple[int, bytes]],
    clips: Mapping[str, bytes],
    workdir: Path,
) -> str:
    """The whole page of an evaluated run.

    log: lines of the transfer's metrics file; facts, samples: as `training.section` takes them;
    clips: mp4 files by their path.
    """
    trained = any(entry["trained_here"] for entry in metrics["contenders"].values())
    linear = metrics["contenders"].get(STUDENT, {}).get("linear_layers", ())
    sections = [
        _head(metrics),
        _videos(metrics, clips),
        _agreement(metrics),
        _table(metrics),
        _layers(metrics),
        training.section(log, facts, linear, samples) if log and trained else "",
        _operations(metrics),
        _origins(metrics, log if trained else []),
        _commands(metrics, workdir, trained),
    ]
    return document(_title(metrics), sections)


def title_of(name: str) -> str:
    """A contender's name as it is shown: "Student before training"."""
    words = name.removesuffix("_before").replace("_", " ")
    before = " before training" if name.endswith("_before") else ""
    return words[:1].upper() + words[1:] + before


def closed(name: str, student: Mapping[str, Any]) -> str:
    """One line on the gap that a student closed."""
    line = (
        f"{title_of(name)}: {100 * student['before']:.1f}% right before training, "
        f"{100 * student['after']:.1f}% after, the teacher {100 * student['teacher']:.1f}%"
    )
    if student["gap_closed"] is None:
        return f"{line}; there is no gap to close"
    low, high = student["interval"]
    return f"{line}; gap closed {student['gap_closed']:.2f} (95%: {low:.2f} to {high:.2f})"


def _title(metrics):
    students = _students(metrics)
    if not students:
        return "The teacher, measured"
    name = STUDENT if STUDENT in students else next(iter(students))
    return f"{_linear(students[name])} made linear"


def _students(metrics):
    return {k: v for k, v in metrics["contenders"].items() if v["role"] == "after"}


def _linear(entry):
    return f"{len(entry['linear_layers'])} of {entry['num_layers']} attention layers"


def _head(metrics):
    made, students = metrics["made"], _students(metrics)
    count = metrics["contenders"][TEACHER]["num_videos"]
    own = made["config"]["evaluate"]
    judged = ", and judged by a classifier of moving digits" if _judged(metrics) else ""
    lead = (
        f"{own['num_prompts']} prompts, sampled by every model from the same noise ({count} videos "
        f"each){judged}."
    )
    facts = []
    if judged:
        rate = _percent(metrics["contenders"][TEACHER])
        facts.append((rate, "of the teacher's videos are all right"))
    for name, entry in students.items():
        what = f"{title_of(name)}: {_linear(entry)} linear"
        if not judged:
            facts.append((f"{entry['psnr']:.1f} dB", f"{what}, PSNR to the teacher's videos"))
            continue
        facts.append((_percent(entry), what))
        gap = metrics["students"].get(name)
        if gap and gap["gap_closed"] is not None:
            low, high = gap["interval"]
            facts.append(
                (
                    f"{gap['gap_closed']:.0%}",
                    f"{title_of(name)}: gap to the teacher closed by training "
                    f"({low:.0%} to {high:.0%})",
                )
            )
    return (
        f"<header><h1>{html.escape(_title(metrics))}</h1>"
        f'<p class="lead">{html.escape(lead)}</p></header>{cards(facts)}'
    )


def _judged(metrics):
    return bool(metrics["contenders"][TEACHER]["agreement"])


def _percent(entry):
    return f"{entry['agreement']['all']['rate']:.0%}"


def _videos(metrics, clips):
    if not metrics["shown"]:
        return ""
    rows = []
    for shown in metrics["shown"]:
        figures = []
        for name, entry in shown["videos"].items():
            data = base64.b64encode(clips[entry["file"]]).decode()
            read = "&nbsp;· ".join(
                html.escape(word) if right else f'<span class="wrong">{html.escape(word)}</span>'
                for word, right in entry["read"]
            )
            label = html.escape(title_of(name))
            figures.append(
                f'<figure><video autoplay loop muted playsinline aria-label="{label}: '
                f'{html.escape(shown["prompt"])}" src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption><b>{label}</b>{read}</figcaption></figure>"
            )
        rows.append(
            f'<div class="clip"><p>{html.escape(shown["prompt"])}</p>'
            f'<div class="row" style="--n:{len(figures)}">{"".join(figures)}</div></div>'
        )
    read = (
        "Under a video stands what the classifier read in it; "
        '<span class="wrong">struck</span> is what the prompt does not say.'
        if _judged(metrics)
        else ""
    )
    note = (
        f"<p>The first {len(rows)} prompts of the list, not picked, each from one noise. {read}</p>"
    )
    return section("videos", "Side by side, from the same noise", note, *rows)


def _agreement(metrics):
    if not _judged(metrics):
        return ""
    rows = []
    for name, entry in metrics["contenders"].items():
        figure = entry["agreement"]["all"]
        rows.append((title_of(name), figure["rate"], tuple(figure["interval"]), entry["role"]))
    ceiling = (metrics["ceiling"] or {}).get("all")
    title = "Share of videos with everything right, with 95% intervals"
    charts = intervals(rows, title, ceiling, (720, 0), "wide")
    charts += intervals(rows, title, ceiling, (340, 0), "narrow")
    limit = (
        f" Dashed: the classifier's own ceiling, {ceiling:.1%} of real clips read right."
        if ceiling is not None
        else ""
    )
    note = (
        "<p>A video is right if digits, colours, directions, speeds, straight or bouncing, and "
        f"background are all as the prompt says. Bars are Wilson's 95% intervals.{limit}</p>"
    )
    lines = "".join(
        f"<p>{html.escape(closed(name, student))}{_per_seed(student)}.</p>"
        for name, student in metrics["students"].items()
    )
    return section("agreement", "What the prompt asked for", note, charts, lines)


def _per_seed(student):
    if len(student["per_seed"]) < 2:
        return ""
    each = [
        f"seed {seed}: {'none' if share is None else f'{share:.2f}'}"
        for seed, share in student["per_seed"].items()
    ]
    return f" ({', '.join(each)})"


def _table(metrics):
    entries = metrics["contenders"]
    judged = _judged(metrics)
    columns = [(name, _share(name)) for name in ATTRIBUTES] if judged else []
    columns.append(("distance of latents", _figure("distance_latents")))
    for key, name in (
        ("psnr", "PSNR, dB"),
        ("ssim", "SSIM"),
        ("distance_video", "distance of pixels"),
        ("frechet", "Frechet distance"),
        ("motion.shape_correlation", "shape correlation"),
        ("motion.path_deviation", "path deviation, px"),
        ("motion.subject_consistency", "subject consistency"),
        ("motion.smoothness", "smoothness"),
        ("motion.dynamic_degree", "dynamic degree"),
        ("quality.background_consistency", "background consistency"),
        ("quality.sharpness", "sharpness"),
    ):
        if key in entries[TEACHER]:
            columns.append((name, _figure(key)))
    if "diversity" in entries[TEACHER]:
        columns.append(("diversity, of the teacher's", _figure("diversity")))
    if "sampling" in entries[TEACHER]:
        columns.append(("steps", lambda entry: f"{entry['sampling']['num_inference_steps']}"))
    columns.append(("s a video", _figure("seconds_per_video")))
    head = "".join(f'<th scope="col">{name}</th>' for name, _ in columns)
    body = "".join(
        f"<tr><td>{html.escape(title_of(name))}<small>{len(entry['linear_layers'])} of "
        f"{entry['num_layers']} layers linear</small></td>"
        f"{''.join(f'<td>{cell(entry)}</td>' for _, cell in columns)}</tr>"
        for name, entry in entries.items()
    )
    if metrics["ceiling"]:
        cells = "".join(f"<td>{100 * metrics['ceiling'][name]:.1f}</td>" for name in ATTRIBUTES)
        rest = "<td></td>" * (len(columns) - len(ATTRIBUTES))
        body += f"<tr><td>Classifier<small>on real clips</small></td>{cells}{rest}</tr>"
    made = metrics["made"]
    agreed = "Agreement in percent, with 95% intervals. " if judged else ""
    note = (
        f"<p>{agreed}Distances are root mean squares to the "
        "teacher's sample of the same noise. Seconds are those of sampling (the median batch) on "
        f"{html.escape(_machine(made))}.{'' if judged else _UNJUDGED}</p>"
    )
    table = (
        f'<div class="scroll"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return section("figures", "Figures", note, table)


def _share(name):
    def cell(entry):
        figure = entry["agreement"][name]
        low, high = figure["interval"]
        return f"{100 * figure['rate']:.1f}<small>{100 * low:.0f} to {100 * high:.0f}</small>"

    return cell


def _figure(key):
    return lambda entry: "" if entry[key] is None else f"{entry[key]:.3g}"


def _machine(made):
    return f"{made['device']} ({made['cores']} cores, JAX {made['jax']}, {made['dtype']})"


def _layers(metrics):
    parts = []
    for name, entry in _students(metrics).items():
        squares = "".join(
            f'<i class="{"on" if layer in entry["linear_layers"] else ""}">{layer}</i>'
            for layer in range(entry["num_layers"])
        )
        many = " many" if entry["num_layers"] > 16 else ""
        layers = ", ".join(map(str, entry["linear_layers"])) or "none"
        parts.append(
            f"<h3>{html.escape(title_of(name))}: {layers}</h3>"
            f'<div class="strip{many}" role="img" aria-label="Linear layers: {layers}">{squares}'
            "</div>"
        )
    if not parts:
        parts = ["<p>None: there is no student here.</p>"]
    else:
        parts.append('<p class="note">From the input on the left; layer 0 is the first.</p>')
    return section("layers", "Which layers became linear", *parts)


def _operations(metrics):
    rows = []
    for name, entry in _students(metrics).items():
        here = f"{title_of(name)}, as sampled here: {entry['tokens']:,} tokens"
        rows.append((here, entry["flops_per_forward"], entry["flops_saved"]))
    students = _students(metrics)
    if students:
        entry = max(students.values(), key=lambda entry: len(entry["linear_layers"]))
        for label, config, tokens in WAN_SIZES:
            share = len(entry["linear_layers"]) / entry["num_layers"]
            layers = range(round(share * config.num_layers))
            rows.append(
                (
                    f"{label}: {tokens:,} tokens, {len(layers)} of {config.num_layers} layers",
                    flops.forward(config, tokens, layers),
                    flops.saved(config, tokens, layers),
                )
            )
    else:
        entry = metrics["contenders"][TEACHER]
        here = f"Teacher, as sampled here: {entry['tokens']:,} tokens"
        rows.append((here, entry["flops_per_forward"], 0.0))
    body = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{_tera(count)}</td><td>{saved:.1%}</td>"
        f'<td><div class="bar"><i style="width:{saved:.1%}"></i></div></td></tr>'
        for label, count, saved in rows
    )
    note = (
        "<p>Softmax attention grows with the square of the tokens, linear attention with their "
        "number, so the same share of layers saves little on these short clips and much at Wan's "
        "own sizes. Counted from the sizes, not measured.</p>"
    )
    table = (
        '<div class="scroll"><table><thead><tr><th scope="col">model</th>'
        '<th scope="col">TFLOP a forward</th><th scope="col">saved</th><th></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return section("flops", "FLOPs saved", note, table)


def _tera(count):
    return f"{count / 1e12:,.3g}" if count < 1e15 else f"{count / 1e12:,.0f}"


def _origins(metrics, log):
    made, entries = metrics["made"], metrics["contenders"]
    config = made["config"]
    here = [
        f"All videos on this page and every figure of agreement, distance, motion and time: "
        f"sampled and measured by this run, on {_machine(made)}, {made['time']}."
    ]
    elsewhere = [
        f"The teacher's weights ({entries[TEACHER]['source']}): trained before; docs/results.md "
        "says how.",
    ]
    if _judged(metrics):
        elsewhere.append(
            f"The classifier ({config['evaluate']['classifier']}) and its own figures on real "
            "clips: trained and validated before; docs/results.md says how."
        )
    for name, entry in _students(metrics).items():
        if entry["trained_here"]:
            updates = f": {log[-1]['step']:,} updates" if log else ""
            here.append(
                f"{title_of(name)} ({entry['source']}): its weights, its scores and the choice of "
                f"its layers were trained by this run{updates}."
            )
        else:
            elsewhere.append(
                f"{title_of(name)} ({entry['source']}): its weights and the choice of its layers "
                "were not made by this run. The shipped student was converted on a GPU: "
                "docs/results.md has the machine, the command and the figures. Its scores on this "
                "page were measured here."
            )
    elsewhere.append("FLOPs: counted from the models' sizes, not measured.")

    def listed(heading, lines):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        return f"<div><h3>{heading}</h3><ul>{items}</ul></div>"

    boxes = listed("Made by this run", here) + listed("Not made by this run", elsewhere)
    return section("origins", "What was made here", f'<div class="where">{boxes}</div>')


def _commands(metrics, workdir, trained):
    made = metrics["made"]
    settings, own = made["settings"], made["config"]["evaluate"]
    commands = [made["command"]]
    if trained:
        out = shlex.quote(str(workdir / "videos"))
        prompt = metrics["shown"][0]["prompt"] if metrics["shown"] else "a red 3 moves slowly up"
        commands.append(
            f"python sample.py --checkpoint={shlex.quote(str(workdir / 'final'))} "
            f"--prompt={shlex.quote(prompt)} --out={out}"
        )
    seeds = ", ".join(map(str, own["seeds"]))
    note = (
        f"<p>{own['num_prompts']} prompts of {html.escape(own['prompts'])}; sampling seeds {seeds} "
        f"(video i of seed s starts from noise s x 100003 + i); {settings['num_inference_steps']} "
        f"steps of {settings['sampler']}, guidance {settings['guidance_scale']:g}, flow shift "
        f"{settings['flow_shift']:g}, {settings['num_frames']} frames of {settings['height']} x "
        f"{settings['width']}; read from {own['reads']}.</p>"
    )
    blocks = f"<pre>{html.escape(chr(10).join(commands))}</pre>"
    return section(
        "commands",
        "Commands",
        note,
        blocks,
        f"<details><summary>The whole configuration</summary>{values(made['config'])}</details>",
    )
