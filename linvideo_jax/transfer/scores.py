"""Selective transfer: one score r per layer, its constraint and its binarizing penalty.

r = 1 is softmax attention, r = 0 linear attention, and in between a layer runs
`r * softmax + (1 - r) * linear` (paper, eq. 8). `target` counts the layers to be replaced.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear_count(r: Float[Array, " layers"]) -> Float[Array, ""]:
    """Number of layers whose rounded score is linear; its straight-through gradient is -1 per r."""
    rounded = r + jax.lax.stop_gradient(jnp.round(r) - r)
    return jnp.sum(1.0 - rounded)


def constraint(r: Float[Array, " layers"], target: int) -> Float[Array, ""]:
    """L_con = (layers rounded to linear - target)^2 (paper, eq. 9)."""
    return (linear_count(r) - target) ** 2


def regulariser(r: Float[Array, " layers"], alpha: Float[Array, ""] | float) -> Float[Array, ""]:
    """L_reg = sum_l (1 - |2 r_l - 1|^alpha) (paper, eq. 10): zero only where every r is 0 or 1."""
    distance = jnp.maximum(jnp.abs(2.0 * r - 1.0), 1e-6)  # the power's gradient at 0 is not finite
    return jnp.sum(1.0 - distance**alpha)


def annealed_alpha(
    progress: Float[Array, ""] | float, start: float = 20.0, end: float = 2.0, until: float = 1.0
) -> Float[Array, ""]:
    """alpha falls linearly from `start` to `end` while progress goes from 0 to `until`, then stays.

    The paper anneals 20 to 2 over the run; `until` < 1 leaves time for the scores to settle.
    """
    return start + (end - start) * jnp.clip(progress / until, 0.0, 1.0)


def choose_linear_layers(r: np.ndarray, target: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `target` layers of smallest r, and the layers that rounding alone would place otherwise.

    Nothing in the losses guarantees that exactly `target` scores end below one half; the second
    value lists the corrections, so that a report can name them. Layers count from 0, sorted.
    """
    chosen = sorted(np.argsort(np.asarray(r), kind="stable")[:target].tolist())
    by_rounding = {layer for layer, score in enumerate(np.asarray(r)) if np.round(score) == 0}
    return tuple(chosen), tuple(sorted(by_rounding.symmetric_difference(chosen)))
