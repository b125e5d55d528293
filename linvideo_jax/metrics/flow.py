"""How much and how smoothly any video moves, by block matching: it needs no network.

VBench asks RAFT and an interpolation network; these figures follow its rules where that is said,
but are not comparable with its own.
"""

import itertools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.ndimage import uniform_filter

_SIDE = 128  # px, the shorter side that is looked at
_REACH = 8  # px of it that a block may move between two frames
_BLOCK = 9  # px
_PENALTY = 0.004  # of luma a px: what is flat stands still
_SCALE = 256  # px, the shorter side that VBench's threshold is of


def flows(
    video: UInt8[np.ndarray, "frames height width 3"], fps: int
) -> Float[np.ndarray, "pairs rows columns 2"]:
    """Motion (down, right) between frames an eighth of a second apart, as VBench picks them.

    In px of a video whose shorter side has 256; a whole px of what is looked at, 128, is 2.
    """
    picked = video[:: max(1, round(fps / 8))]
    frames = [_small(frame) for frame in picked]
    scale = _SCALE / min(frames[0].shape)
    pairs = [_match(a, b) for a, b in itertools.pairwise(frames)]
    return scale * np.array(pairs).reshape(len(pairs), *frames[0].shape, 2)


def _small(frame: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "rows columns"]:
    """Luma in [0, 1]."""
    luma = Image.fromarray(frame).convert("L")
    share = min(1.0, _SIDE / min(luma.size))
    size = [max(1, round(share * side)) for side in luma.size]
    return np.asarray(luma.resize(size, Image.Resampling.BOX), np.float32) / 255


def _match(
    a: Float[np.ndarray, "rows columns"], b: Float[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "rows columns 2"]:
    """Where the block around each pixel of a is in b: the move of the least mean difference."""
    reach = min(_REACH, (min(a.shape) - 1) // 2)
    padded = np.pad(b, reach, mode="edge")
    best = np.full(a.shape, np.inf, np.float32)
    found = np.zeros((*a.shape, 2), np.float32)
    moves = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    for dy, dx in sorted(moves, key=lambda move: move[0] ** 2 + move[1] ** 2):
        there = padded[reach + dy :, reach + dx :][: a.shape[0], : a.shape[1]]
        cost = uniform_filter(np.abs(a - there), _BLOCK, mode="nearest")
        cost += _PENALTY * np.hypot(dy, dx)
        nearer = cost < best
        best[nearer], found[nearer] = cost[nearer], (dy, dx)
    return found


def speed(found: Float[np.ndarray, "pairs rows columns 2"]) -> float:
    """Mean motion in px (of a shorter side of 256) in an eighth of a second; NaN: one frame."""
    return float(np.linalg.norm(found, axis=-1).mean()) if len(found) else float("nan")


def smoothness(found: Float[np.ndarray, "pairs rows columns 2"]) -> float:
    """1 / (1 + mean change of motion from pair to pair in px), in (0, 1]; NaN below 3 frames."""
    if len(found) < 2:
        return float("nan")
    return float(1 / (1 + np.linalg.norm(np.diff(found, axis=0), axis=-1).mean()))


def is_dynamic(found: Float[np.ndarray, "pairs rows columns 2"]) -> bool:
    """VBench's rule (vbench/dynamic_degree.py) on these flows.

    The mean of the fastest 5% of the pixels is above 6 px, of a shorter side of 256, in a quarter
    of the frames.
    """
    if not len(found):
        return False
    lengths = np.sort(np.linalg.norm(found, axis=-1).reshape(len(found), -1), axis=1)
    fastest = lengths[:, -max(1, lengths.shape[1] // 20) :].mean(1)
    return bool(np.sum(fastest > 6) >= max(1, round((len(found) + 1) / 4)))
