"""What an evaluation found, to look at side by side: a table for documents, and a contact sheet."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from linvideo_jax import video
from linvideo_jax.report.page import title_of

# Of a contender's entry in metrics.json: heading, key, factor and format.
_COLUMNS = (
    ("Frechet", "frechet", 1, ".2f"),
    ("diversity, % of the teacher's", "diversity", 100, ".1f"),
    ("dynamic degree, %", "motion.dynamic_degree", 100, ".1f"),
    ("PSNR, dB", "psnr", 1, ".1f"),
    ("SSIM", "ssim", 1, ".3f"),
    ("s a video", "seconds_per_video", 1, ".3g"),
)
_LINE, _GAP, _MARGIN, _LABELS = 16, 6, 16, 190  # px
_PAPER, _INK, _QUIET = (255, 255, 255), (28, 31, 35), (102, 108, 115)


def table(metrics: dict[str, Any]) -> str:
    """Markdown, a row for each model: how it is sampled, agreement in percent, and the rest.

    Behind agreement and diversity stands their 95% interval.
    """
    entries = metrics["contenders"]
    first = next(iter(entries.values()))
    attributes = ["all", *(name for name in first["agreement"] if name != "all")]
    attributes = attributes if first["agreement"] else []
    columns = [column for column in _COLUMNS if any(column[1] in e for e in entries.values())]
    lines = [
        ["", "linear", "steps", "guidance", *attributes, *(heading for heading, *_ in columns)]
    ]
    lines.append(["---"] * len(lines[0]))
    for name, entry in entries.items():
        own = entry["sampling"]
        lines.append(
            [
                title_of(name),
                f"{len(entry['linear_layers'])} of {entry['num_layers']}",
                f"{own['num_inference_steps']} {own['sampler']}",
                f"{own['guidance_scale']:g}",
                *(_agreement(entry["agreement"][key], key == "all") for key in attributes),
                *(_cell(entry, *column[1:]) for column in columns),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _agreement(figure, interval):
    low, high = (100 * value for value in figure["interval"])
    return f"{100 * figure['rate']:.1f}" + (f" ({low:.1f} to {high:.1f})" if interval else "")


def _cell(entry, key, factor, form):
    if entry.get(key) is None:
        return ""
    text = f"{factor * entry[key]:{form}}"
    if interval := entry.get(f"{key}_interval"):
        text += " ({} to {})".format(*(f"{factor * value:{form}}" for value in interval))
    return text


def contact_sheet(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "videos frames height width 3"]]],
    prompts: Sequence[str],
    frames: int = 6,
) -> UInt8[np.ndarray, "height width 3"]:
    """Under each prompt a strip of frames of every model's video, all from one noise.

    rows: (name, videos), one video a prompt.
    """
    height, width = rows[0][1].shape[2:4]
    strip = frames * width
    block = _LINE + len(rows) * (height + _GAP)
    size = (_LABELS + strip + 2 * _MARGIN, len(prompts) * (block + _MARGIN) + _MARGIN)
    page = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, prompt in enumerate(prompts):
        top = _MARGIN + i * (block + _MARGIN)
        pen.text((_MARGIN, top), prompt, fill=_INK, font=font)
        for k, (name, videos) in enumerate(rows):
            y = top + _LINE + _GAP + k * (height + _GAP)
            for line, words in enumerate(textwrap.wrap(title_of(name), 28)[: height // _LINE]):
                pen.text((_MARGIN, y + line * _LINE), words, fill=_QUIET, font=font)
            picture = Image.fromarray(video.strip(videos[i], frames))
            page.paste(picture, (_MARGIN + _LABELS, y))
    return np.asarray(page)
