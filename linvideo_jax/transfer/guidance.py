"""The guided velocity of a network that is trained or learned from."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from linvideo_jax.flow import rectified
from linvideo_jax.transfer.objectives import Velocity

Text = tuple[Array, Array]  # embeddings and lengths of a batch


def guided(
    velocity: Callable[..., Array], text: Text, negative: Text, guidance_scale: float | Array
) -> Velocity:
    """u_neg + w (u_cond - u_neg), both branches in one batch.

    velocity(x, t, text, text_lengths).
    """

    def both(x, t):
        branches = (x, t, *text), (x, t, *negative)
        twice = (jnp.concatenate(pair) for pair in zip(*branches, strict=True))
        return rectified.guided(*jnp.split(velocity(*twice), 2), guidance_scale)

    return both
