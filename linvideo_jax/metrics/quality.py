"""Small measures of a video that need no prompt, and its distance to the teacher's."""

import numpy as np
from jaxtyping import Float

from linvideo_jax.metrics.motion import ink


def background_consistency(video: Float[np.ndarray, "frames height width 3"]) -> float:
    """1 minus the mean change of the background, in shares of the range; 1 is a still one.

    The change of a frame is the mean of its differences from the first and the previous frame,
    over the pixels that no digit covers in either.
    """
    clear = ~_covered(video)

    def change(a, b, both):
        gap = np.abs(a - b).mean(-1) / 2
        return (gap * both).sum((1, 2)) / np.maximum(both.sum((1, 2)), 1)

    first = change(video[1:], video[:1], clear[1:] & clear[:1])
    before = change(video[1:], video[:-1], clear[1:] & clear[:-1])
    return float(1 - (first + before).mean() / 2)


def _covered(video):
    """Pixels with ink, grown by two."""
    covered = (ink(video) > 0.3).any(0)
    for _ in range(2):
        grown = covered.copy()
        for axis in (1, 2):
            for step in (-1, 1):
                grown |= np.roll(covered, step, axis)
        covered = grown
    return covered


def sharpness(video: Float[np.ndarray, "frames height width 3"]) -> float:
    """Steepness of the strongest edges: the top 1% of luma steps over the frame's range of luma.

    In [0, 1]: 1 is an edge from darkest to lightest within one pixel, blur lowers it.
    """
    luma = video @ np.array([0.299, 0.587, 0.114], np.float32)
    steps = np.maximum(np.abs(np.diff(luma, axis=1))[:, :, :-1], np.abs(np.diff(luma))[:, :-1])
    steps = np.sort(steps.reshape(len(luma), -1), axis=1)
    top = steps[:, -max(1, steps.shape[1] // 100) :].mean(1)
    low, high = np.quantile(luma.reshape(len(luma), -1), [0.001, 0.999], axis=1)
    return float((top / np.maximum(high - low, 1e-3)).clip(0, 1).mean())


def dynamic_degree(speeds: Float[np.ndarray, " videos"], least: float = 0.25) -> float:
    """Share of videos whose digits move at least `least` px a frame (`motion.Motion.speed`)."""
    return float(np.mean(np.nan_to_num(speeds) >= least))


def distance(
    ours: Float[np.ndarray, "n *shape"], theirs: Float[np.ndarray, "n *shape"]
) -> Float[np.ndarray, " n"]:
    """Root mean square difference of each video (or latent) from the one of the same noise."""
    difference = np.asarray(ours, np.float32) - np.asarray(theirs, np.float32)
    return np.sqrt((difference**2).reshape(len(difference), -1).mean(-1))
