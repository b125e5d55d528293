"""Which layers became linear, over rows and seeds: a picture, and agreement with the profile."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from linvideo_jax.report.style import CSS
from linvideo_jax.transfer import selection

Record = dict[str, Any]

_CELL, _ROW, _CHARACTER = 22, 26, 7


def chose(runs: Sequence[Record]) -> list[Record]:
    """The runs whose layers are known."""
    return [run for run in runs if "layers" in run.get("selection", {})]


def layer_errors(profile: Record) -> np.ndarray:
    """The profile's error after recovery by layer: the mean over the ranges that hold it."""
    found: list[list[float]] = [[] for _ in range(profile["num_layers"])]
    for row in profile["rows"]:
        for layer in row["layers"]:
            found[layer].append(row["error_after"])
    return np.array([np.mean(errors) for errors in found])


def agreement(runs: Sequence[Record], profile: Record) -> dict[str, float]:
    """How the choices of several runs agree with each other and with the profile.

    between_runs: the mean over pairs of runs of the share of layers in common; with_profile: the
    same with the profile's own greedy choice of as many; by_chance: what random choices of as many
    layers have in common on average. rank_correlation: Spearman's, of how often a layer was chosen
    and minus its error.
    """
    sets = [set(run["selection"]["layers"]) for run in chose(runs)]
    num_layers = profile["num_layers"]
    often = np.array([sum(layer in each for each in sets) for layer in range(num_layers)])
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    greedy = [(a, set(selection.by_profile(profile, len(a), num_layers))) for a in sets]
    result = {
        "between_runs": _common(pairs),
        "with_profile": _common(greedy),
        "by_chance": float(np.mean([len(each) for each in sets])) / num_layers,
    }
    if np.ptp(often):
        rank = spearmanr(often, -layer_errors(profile)).statistic
        result["rank_correlation"] = float(rank)
    return result


def _common(pairs: Sequence[tuple[set, set]]) -> float:
    shares = [len(a & b) / max(len(a), 1) for a, b in pairs]
    return float(np.mean(shares)) if shares else float("nan")


def picture(runs: Sequence[Record], num_layers: int, profile: Record | None = None) -> str:
    """A standalone SVG: a strip of layers for every run, green where linear, and the profile below.

    The profile's bars are each layer's error, relative to the largest.
    """
    runs, note = chose(runs), "error in the profile"
    labels = [f"{run['name']}, seed {run['seed']}" for run in runs]
    left = 16 + _CHARACTER * max(map(len, [*labels, note]))
    width, parts, y = left + _CELL * num_layers + 10, [], 8
    for run, label in zip(runs, labels, strict=True):
        parts.append(f'<text class="label" x="8" y="{y + 15}">{html.escape(label)}</text>')
        for layer in range(num_layers):
            linear = layer in run["selection"]["layers"]
            style = "fill:var(--linear)" if linear else "fill:var(--field);stroke:var(--rule)"
            parts.append(
                f'<rect x="{left + _CELL * layer}" y="{y}" width="{_CELL - 3}" '
                f'height="{_CELL - 3}" rx="3" style="{style}"/>'
            )
        y += _ROW
    if profile is not None:
        errors = layer_errors(profile)
        parts.append(f'<text class="label" x="8" y="{y + 32}">{note}</text>')
        for layer, error in enumerate(errors):
            height = 40 * error / errors.max()
            parts.append(
                f'<rect x="{left + _CELL * layer}" y="{y + 44 - height:.1f}" '
                f'width="{_CELL - 3}" height="{height:.1f}" style="fill:var(--before)">'
                f"<title>layer {layer}: {error:.3g}</title></rect>"
            )
        y += 50
    for layer in range(num_layers):
        x = left + _CELL * layer + (_CELL - 3) / 2
        parts.append(f'<text x="{x}" y="{y + 10}" text-anchor="middle">{layer}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {y + 18}">'
        f'<style>{CSS}</style><rect width="100%" height="100%" style="fill:var(--paper)"/>'
        f"{''.join(parts)}</svg>\n"
    )
