"""Agreement between what a prompt says and what the classifier sees in the video."""

import numpy as np
from jaxtyping import Bool, Float

from linvideo_jax.data.digits import ABSENT, UNSAID, Labels

Agreement = dict[str, Bool[np.ndarray, " videos"]]


def agree(said: Labels, seen: Labels) -> Agreement:
    """Whether each video shows what was said, per attribute and "all" of them together.

    "colour": exactly the named colours are there. Every other attribute is right if it is for each
    digit named; what is UNSAID is not judged.
    """
    named, shown = said.digit != ABSENT, seen.digit != ABSENT
    right = {"digit": ((said.digit == seen.digit) | ~named).all(-1)}
    right["colour"] = (named == shown).all(-1)
    for name in ("direction", "speed", "bounce"):
        ours, theirs = getattr(said, name), getattr(seen, name)
        right[name] = ((ours == theirs) | ~named | (ours == UNSAID)).all(-1)
    right["background"] = np.asarray(said.background == seen.background)
    right["all"] = np.all(list(right.values()), axis=0)
    return right


def rates(right: Agreement) -> dict[str, float]:
    """Share of videos that are right, per attribute and "all"."""
    return {name: float(np.mean(values)) for name, values in right.items()}


def wilson(right: Bool[np.ndarray, " videos"], z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share of right videos (Wilson 1927)."""
    n, share = len(right), float(np.mean(right))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def gap_closed(
    teacher: Bool[np.ndarray, "seeds prompts"],
    before: Bool[np.ndarray, "seeds prompts"],
    after: Bool[np.ndarray, "seeds prompts"],
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(after - before) / (teacher - before) of three paired sets, and its 95% bootstrap interval.

    Prompts are resampled, each with all its seeds and all three models, for these are not
    independent of each other. NaN without a gap.
    """
    table = np.stack([teacher, before, after]).mean(1)

    def ratio(means: Float[np.ndarray, "3 *samples"]):
        gap = means[0] - means[1]
        return np.where(gap > 0, (means[2] - means[1]) / np.where(gap > 0, gap, 1), np.nan)

    rows = np.random.default_rng(seed).integers(table.shape[1], size=(samples, table.shape[1]))
    spread = ratio(table[:, rows].mean(-1))
    spread = spread[~np.isnan(spread)]
    low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (np.nan, np.nan)
    return float(ratio(table.mean(-1))), float(low), float(high)
