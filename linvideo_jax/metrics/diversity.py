"""How far the samples of one prompt are from each other: less than the teacher's is mode collapse.

A sample that is blurred or always the same is near the next one of its prompt; one that ignores the
prompt, or is noise, is far. So it is read beside the agreement, never alone.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Float


def spread(samples: Float[np.ndarray, "samples prompts *shape"]) -> Float[np.ndarray, " prompts"]:
    """Mean root mean square distance between two samples of a prompt, over all pairs of them.

    samples: latents or features, 2 or more for each prompt, from different noise.
    """
    flat = np.asarray(samples, np.float32).reshape(*samples.shape[:2], -1)
    pairs = combinations(range(len(flat)), 2)
    return np.mean([np.sqrt(((flat[a] - flat[b]) ** 2).mean(-1)) for a, b in pairs], axis=0)


def kept(
    ours: Float[np.ndarray, " prompts"],
    teachers: Float[np.ndarray, " prompts"],
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean spread over the teacher's, of the same prompts, and its 95% bootstrap interval.

    Prompts are resampled, each with both models.
    """
    rows = np.random.default_rng(seed).integers(len(ours), size=(samples, len(ours)))
    shares = ours[rows].mean(1) / teachers[rows].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(ours.mean() / teachers.mean()), float(low), float(high)
