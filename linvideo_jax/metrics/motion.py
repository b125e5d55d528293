"""How digits move and keep their shape, measured on pixels: each is found by its colour.

These say nothing about a video without the named digits: read them with the agreement.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import uniform_filter

from linvideo_jax.data.digits import ABSENT, COLOURS, FRAME, Labels
from linvideo_jax.threads import each

_PALETTE = np.array(list(COLOURS.values()), np.float32) / 127.5 - 1
_CROP = 44  # px, holds the largest digit
_LEAST_INK = 30.0  # px of ink below which a digit counts as lost


class Track(NamedTuple):
    """One digit through a video: its crops, centres (x, y) in px and whether it was found."""

    crops: Float[np.ndarray, "frames size size"]
    centres: Float[np.ndarray, "frames xy"]
    found: Bool[np.ndarray, " frames"]


class Motion(NamedTuple):
    """Figures of n videos, each the mean over the video's named digits; NaN: never found.

    shape_correlation: of a digit's crop with that of 8 frames later, in [-1, 1]; 0 where lost.
    path_deviation: root mean square distance in px of its centre from the fitted motion law.
    subject_consistency: correlation with the first and the previous frame, averaged.
    speed: px a frame; smoothness: 1 / (1 + mean change of velocity in px a frame), in (0, 1].
    """

    shape_correlation: Float[np.ndarray, " n"]
    path_deviation: Float[np.ndarray, " n"]
    subject_consistency: Float[np.ndarray, " n"]
    speed: Float[np.ndarray, " n"]
    smoothness: Float[np.ndarray, " n"]


def measure(videos: Float[np.ndarray, "n frames 96 96 3"], said: Labels, apart: int = 8) -> Motion:
    """Measures the digits that `said` names in videos of [-1, 1]."""

    def row(i):
        slots = np.flatnonzero(said.digit[i] != ABSENT)
        tracks = track(np.asarray(videos[i]), slots)
        return np.mean(
            [
                (
                    shape_correlation(digit, apart),
                    path_deviation(digit, bool(said.bounce[i, slot] != 0)),
                    subject_consistency(digit),
                    *_pace(digit),
                )
                for digit, slot in zip(tracks, slots, strict=True)
            ],
            axis=0,
        )

    return Motion(*np.array(each(row, range(len(videos)))).T)


def background_colour(video: Float[np.ndarray, "frames height width 3"]) -> np.ndarray:
    """The median pixel, [3]."""
    return np.median(video[:, ::3, ::3].reshape(-1, 3), axis=0).astype(np.float32)


def ink(video: Float[np.ndarray, "frames height width 3"]) -> Float[np.ndarray, "6 f h w"]:
    """How far each pixel is from the background towards each colour, in [0, 1].

    A pixel belongs to the one colour on whose way from the background it lies nearest.
    """
    ground = background_colour(video)
    ways = (_PALETTE - ground).T
    length = (ways**2).sum(0)
    along = (video - ground) @ (ways / length)
    share = np.clip(along, 0, 1)
    # |away - share way|^2, less what is the same for all colours.
    across = (share - 2 * along) * share * length
    best = across.argmin(-1)
    return np.stack([np.where(best == c, share[..., c], 0) for c in range(len(_PALETTE))])


def track(video: Float[np.ndarray, "frames 96 96 3"], slots) -> list[Track]:
    """Follows the digits of the colour slots through one video."""
    everything = ink(video)
    return [_follow(everything[slot]) for slot in slots]


def _follow(digit):
    solid = np.where(digit > 0.4, digit, 0.0)
    # Lone pixels are noise: a pixel counts as far as its neighbourhood has ink.
    solid = solid * (uniform_filter(solid, (0, 3, 3), mode="constant") > 0.34)
    total = solid.sum((1, 2))
    found = total > _LEAST_INK
    grid = np.arange(FRAME) + 0.5
    safe = np.maximum(total, 1e-6)
    x = (solid.sum(1) * grid).sum(-1) / safe
    y = (solid.sum(2) * grid).sum(-1) / safe
    frames = np.arange(len(digit))
    if found.any():
        x, y = (np.interp(frames, frames[found], c[found]) for c in (x, y))
    return Track(_crop(digit, x, y), np.stack([x, y], -1), found)


def _crop(digit, x, y):
    """Bilinear crops of _CROP px around the centres, [frames, _CROP, _CROP]."""
    pad = _CROP
    padded = np.pad(digit, ((0, 0), (pad, pad), (pad, pad)))
    corner = np.stack([y, x], -1) - 0.5 - (_CROP - 1) / 2 + pad
    whole = np.floor(corner).astype(int)
    part = (corner - whole).astype(np.float32)
    reach = np.arange(_CROP + 1)
    rows, columns = whole[:, :1] + reach, whole[:, 1:] + reach
    window = padded[np.arange(len(digit))[:, None, None], rows[:, :, None], columns[:, None]]
    fy, fx = part[:, :1, None], part[:, 1:, None]
    window = window[:, :-1] * (1 - fy) + window[:, 1:] * fy
    return window[:, :, :-1] * (1 - fx) + window[:, :, 1:] * fx


def _correlate(a, b):
    a, b = (c.reshape(len(c), -1) - c.mean((1, 2))[:, None] for c in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-6)


def shape_correlation(digit: Track, apart: int = 8) -> float:
    """Mean correlation of crops `apart` frames apart; a lost digit counts as 0."""
    kept = digit.found[apart:] & digit.found[:-apart]
    return float(np.mean(_correlate(digit.crops[apart:], digit.crops[:-apart]) * kept))


def subject_consistency(digit: Track) -> float:
    """Mean over frames of the correlations with the first and the previous crop, halved."""
    kept = digit.found[1:]
    first = _correlate(digit.crops[1:], np.broadcast_to(digit.crops[:1], digit.crops[1:].shape))
    before = _correlate(digit.crops[1:], digit.crops[:-1])
    return float(np.mean((first + before) / 2 * (kept & digit.found[:-1] & digit.found[0])))


def path_deviation(digit: Track, may_bounce: bool) -> float:
    """Root mean square distance in px from the nearest path of the motion law.

    Along each axis a straight line or, where it may bounce, a triangle wave of any turning times
    at least a quarter of 81 frames apart. NaN if the digit is lost in over half of the frames.
    """
    if digit.found.mean() <= 0.5:
        return float("nan")
    shapes = _laws(len(digit.centres), may_bounce)
    rest = digit.centres - digit.centres.mean(0)
    left = (rest**2).sum(0) - ((shapes @ rest) ** 2).max(0)
    return float(np.sqrt(max(0.0, left.sum()) / len(rest)))


@functools.cache
def _laws(num_frames, may_bounce):
    """Unit vectors without mean, [laws, frames]: a line, and triangle waves."""
    time = np.arange(num_frames, dtype=np.float64)
    laws = [time]
    if may_bounce:
        for half in np.geomspace(20, 4 * num_frames, 100):
            for turn in np.arange(0, min(half, num_frames), 0.25):
                laws.append(np.abs((time - turn + half) % (2 * half) - half))
    laws = np.stack(laws)
    laws = laws - laws.mean(1, keepdims=True)
    return laws / np.linalg.norm(laws, axis=1, keepdims=True)


def _pace(digit):
    """(speed, smoothness) of `Motion`; the three sharpest turns may be bounces and do not count."""
    if digit.found.mean() <= 0.5:
        return float("nan"), float("nan")
    step = np.diff(digit.centres, axis=0)
    turns = np.sort(np.linalg.norm(np.diff(step, axis=0), axis=-1))[:-3]
    return float(np.linalg.norm(step, axis=-1).mean()), float(1 / (1 + turns.mean()))
