"""The page of a run while it trains."""

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linvideo_jax.report import training
from linvideo_jax.report.document import cards, document, section, values


def build(
    log: Sequence[dict[str, Any]],
    facts: Mapping[str, Any],
    samples: Sequence[tuple[int, bytes]],
    config: Mapping[str, Any],
    workdir: Path,
) -> str:
    """The page of a run that is not evaluated yet; it loads itself anew twice a minute."""
    num_steps, step = facts.get("num_steps", log[-1]["step"]), log[-1]["step"]
    figures = [(f"{step:,}", f"of {num_steps:,} steps")]
    left = training.seconds_left(log, num_steps)
    if left:
        figures.append((_duration(left), "of training left at this pace"))
    linear: list[int] = []
    if "r" in log[-1]:
        linear = [layer for layer, score in enumerate(log[-1]["r"]) if score < 0.5]
        figures.append((f"{len(linear)} of {len(log[-1]['r'])}", "layers linear if rounded now"))
        if "flops_saved_a_layer" in facts:
            attention, whole = training.saved_shares(log[-1]["r"], facts)
            figures.append((f"{attention:.0%}", "of self-attention's FLOPs saved so"))
            figures.append((f"{whole:.0%}", "of all FLOPs saved so"))
    if "mixed_layers" in log[-1]:
        figures.append((f"{log[-1]['mixed_layers']}", "layers still mixed"))
    title = f"{workdir.name}: step {step:,} of {num_steps:,}"
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    head = (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="lead">Not evaluated yet; this page was written {written} and loads itself '
        f"anew.</p></header>{cards(figures)}"
    )
    sections = [head, training.section(log, facts, linear, samples)]
    if config:
        sections.append(section("commands", "The whole configuration", values(config)))
    return document(title, sections, '<meta http-equiv="refresh" content="30">\n')


def _duration(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else "< 1 min"
