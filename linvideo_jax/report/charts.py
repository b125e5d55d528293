"""Small inline SVG charts; their colours are classes of the page's style and follow its theme."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 24


class Line(NamedTuple):
    """One curve: its class in the style, and its name, which shows on hovering."""

    x: Sequence[float]
    y: Sequence[float]
    kind: str
    name: str


def lines(
    curves: Sequence[Line],
    title: str,
    size: tuple[int, int] = (340, 190),
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    classes: str = "",
    wide_x: bool = False,
) -> str:
    """Curves over steps; logarithmic where they are positive and span more than a factor of 20.

    wide_x: x is logarithmic too. marks: vertical lines (step, word). `title` is for readers of the
    page who hear it.
    """
    width, height = size
    x_all = np.concatenate([curve.x for curve in curves])
    y_all = np.concatenate([curve.y for curve in curves])
    logarithmic = y_range is None and y_all.min() > 0 and y_all.max() / y_all.min() > 20
    low, high = y_range or _padded(y_all, logarithmic)
    ticks = _decades(low, high) if logarithmic else _even(low, high)
    rise = math.log10 if logarithmic else float
    x_low, x_high = float(x_all.min()), float(max(x_all.max(), x_all.min() + 1))

    along = math.log10 if wide_x else float

    def at_x(x):
        share = (along(x) - along(x_low)) / (along(x_high) - along(x_low))
        return _LEFT + share * (width - _LEFT - _RIGHT)

    def at_y(y):
        share = (rise(y) - rise(low)) / (rise(high) - rise(low))
        return height - _BOTTOM - share * (height - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{width - _RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    even = _even(x_low, x_high, 4 if width < 500 else 8, whole=True)
    for tick in _decades(x_low, x_high) if wide_x else even:
        parts.append(
            f'<text x="{at_x(tick):.1f}" y="{height - 7}" text-anchor="middle">'
            f"{_number(tick)}</text>"
        )
    for i, (step, word) in enumerate(marks):
        if x_low < step < x_high:
            x = at_x(step)
            parts.append(f'<path class="mark" d="M{x:.1f} {_TOP}V{height - _BOTTOM}"/>')
            parts.append(
                f'<text x="{x + 4:.1f}" y="{_TOP + 13 + 13 * i}">{html.escape(word)}</text>'
            )
    for curve in curves:
        points = [
            f"{at_x(x):.1f} {at_y(min(max(y, low), high)):.1f}"
            for x, y in zip(curve.x, curve.y, strict=True)
        ]
        parts.append(
            f'<path class="curve {curve.kind}" d="M{"L".join(points)}">'
            f"<title>{html.escape(curve.name)}</title></path>"
        )
    return _svg(width, height, title, parts, classes)


def heatmap(
    rows: Sequence[Sequence[float]], x_range: tuple[float, float], title: str, height: int = 0
) -> str:
    """Values in [0, 1] as a picture, a row each: green at 0, grey at 1; numbered from 0."""
    low, high = np.array([11, 122, 111]), np.array([214, 217, 219])
    values = np.clip(np.array(rows), 0, 1)[..., None]
    pixels = (low + (high - low) * values).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png", optimize=True)
    width, height = 1040, height or max(80, min(16 * len(rows), 480)) + _BOTTOM
    inner = width - _LEFT - _RIGHT, height - _BOTTOM
    data = base64.b64encode(file.getvalue()).decode()
    parts = [
        f'<image x="{_LEFT}" y="0" width="{inner[0]}" height="{inner[1]}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    ]
    for row in _even(0, max(len(rows) - 1, 1), min(len(rows), 8)):
        if row == int(row) and row < len(rows):
            y = (row + 0.5) / len(rows) * inner[1]
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{row:g}</text>'
            )
    first, last = x_range
    for tick in _even(first, max(last, first + 1), 8):
        x = _LEFT + (tick - first) / max(last - first, 1) * inner[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - 7}" text-anchor="middle">{_number(tick)}</text>'
        )
    return _svg(width, height, title, parts, "")


def intervals(
    rows: Sequence[tuple[str, float, tuple[float, float], str]],
    title: str,
    ceiling: float | None = None,
    size: tuple[int, int] = (340, 0),
    classes: str = "",
) -> str:
    """Shares with their intervals, a row each: (label, share, (low, high), class); in [0, 1]."""
    width, row = size[0], 34
    height = row * len(rows) + _BOTTOM
    parts = []

    def at_x(share):
        return 6 + share * (width - 12)

    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = at_x(tick)
        anchor = {0: "start", 1: "end"}.get(tick, "middle")
        parts.append(f'<path class="rule" d="M{x:.1f} 4V{height - _BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{tick:.0%}</text>')
    if ceiling is not None:
        parts.append(f'<path class="mark" d="M{at_x(ceiling):.1f} 4V{height - _BOTTOM + 4}"/>')
    for i, (label, share, (low, high), kind) in enumerate(rows):
        y = row * i + 24
        words = f"{html.escape(label)} {share:.0%}"
        parts.append(f'<text class="label" x="6" y="{y - 7}">{words}</text>')
        parts.append(f'<path class="span {kind}" d="M{at_x(low):.1f} {y}H{at_x(high):.1f}"/>')
        parts.append(
            f'<circle class="dot {kind}" cx="{at_x(share):.1f}" cy="{y}" r="4">'
            f"<title>{html.escape(label)}: {share:.1%}, {low:.1%} to {high:.1%}</title></circle>"
        )
    return _svg(width, height, title, parts, classes)


def bars(
    rows: Sequence[tuple[str, float, str, str]], title: str, size: tuple[int, int] = (560, 0)
) -> str:
    """Lengths beside each other, a row each: (label, length, its text, class), from zero on."""
    width, row = size[0], 34
    longest = max(length for _, length, _, _ in rows)
    parts = []
    for i, (label, length, text, kind) in enumerate(rows):
        y, end = row * i + 26, 6 + length / longest * (width - 12)
        words = f"{html.escape(label)}, {html.escape(text)}"
        parts.append(f'<text class="label" x="6" y="{y - 7}">{words}</text>')
        parts.append(f'<path class="span {kind}" style="stroke-width:8" d="M6 {y}H{end:.1f}"/>')
    return _svg(width, row * len(rows) + 6, title, parts, "")


def alone(svg: str, css: str) -> str:
    """A chart as a file of its own."""
    head, rest = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head}><style>{html.escape(css, quote=False)}</style>{paper}{rest}\n"


def thinned(x: Sequence[float], y: Sequence[float], most: int = 240) -> tuple[list, list]:
    """At most `most` points, each the mean of its neighbourhood."""
    size = -(-len(x) // most)
    cuts = range(0, len(x), size)
    return tuple([float(np.mean(v[i : i + size])) for i in cuts] for v in (x, y))


def smooth(y: Sequence[float]) -> list[float]:
    """The running mean over a twentieth of the curve to both sides."""
    reach = max(1, len(y) // 20)
    return [float(np.mean(y[max(0, i - reach) : i + reach + 1])) for i in range(len(y))]


def _svg(width, height, title, parts, classes):
    return (
        f'<svg class="chart {classes}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def _padded(values, logarithmic):
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return low / 1.1, high * 1.1
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - margin), high + margin


def _decades(low, high):
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    ticks = [10.0**power for power in range(first, last + 1)]
    if len(ticks) < 3:
        ticks = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _even(low, high, count=4, whole=False):
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (power * m for m in (1, 2, 2.5, 5, 10) if not whole or power * m % 1 == 0)
    step = next(step for step in steps if step >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value):
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}"
