"""The replaceability figure: a panel for each metric over the ranges of layers."""

import html
from typing import Any

from linvideo_jax.report.charts import Line, lines
from linvideo_jax.report.style import CSS

# A panel each: its title, and the keys of a row with the class of their curve.
_PANELS = (
    ("Velocity error on validation pairs: before recovery, after (green)",
     (("error_before", "before"), ("error_after", "linear"))),
    ("Share of videos with everything right", (("all_right", "linear"),)),
    ("Distance to the teacher's latents", (("distance_latents", "linear"),)),
)  # fmt: skip
_WIDTH, _HEIGHT, _HEAD = 560, 220, 24


def figure(profile: dict[str, Any]) -> str:
    """A standalone SVG of `profile.json`; x is the first layer of a range, counted from 0."""
    rows = profile["rows"]
    first = [row["layers"][0] for row in rows]
    parts, top = [], 0
    for title, keys in _PANELS:
        curves = [
            Line(first, [row[key] for row in rows], kind, key)
            for key, kind in keys
            if key in rows[0]
        ]
        if not curves:
            continue
        share = (0.0, 1.0) if keys[0][0] == "all_right" else None
        chart = lines(curves, title, (_WIDTH, _HEIGHT), share)
        # The class of a chart of its own would stretch it over the whole figure.
        place = f'<svg y="{top + _HEAD}" width="{_WIDTH}" height="{_HEIGHT}" '
        parts.append(f'<text class="label" x="8" y="{top + 16}">{html.escape(title)}</text>')
        parts.append(chart.replace('<svg class="chart " ', place, 1))
        top += _HEAD + _HEIGHT
    width = profile["width"]
    note = f"x: first of {width} consecutive layers" if width > 1 else "x: the layer"
    parts.append(f'<text class="label" x="8" y="{top + 14}">{note} made linear</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {_WIDTH} {top + 22}">'
        f"<style>{CSS}</style>"
        f'<rect width="100%" height="100%" style="fill:var(--paper)"/>{"".join(parts)}</svg>\n'
    )
