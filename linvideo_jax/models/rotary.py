"""Rotary position embedding over frame, row and column, as Wan2.1 has it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BASE = 10_000.0

# Cosines and sines.
Rotation = tuple[Float[Array, "tokens 1 pairs"], Float[Array, "tokens 1 pairs"]]


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions rotate with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(grid: tuple[int, ...], head_dim: int) -> Rotation:
    """Cosines and sines, float32 of float64 angles, of the tokens of a grid in row-major order."""
    tables = []
    for axis, (length, dims) in enumerate(zip(grid, rotary_axes(head_dim), strict=True)):
        frequencies = BASE ** (-np.arange(0, dims, 2) / dims)
        angles = np.arange(length)[:, None] * frequencies
        shape = [1, 1, 1, dims // 2]
        shape[axis] = length
        tables.append(angles.reshape(shape))

    def table(function):
        # Broadcast by XLA: a long video's full table is too large to be a constant.
        parts = [
            jnp.broadcast_to(function(angles).astype(np.float32), (*grid, angles.shape[-1]))
            for angles in tables
        ]
        return jnp.concatenate(parts, axis=-1).reshape(-1, 1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], table: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates the pairs (x[2i], x[2i + 1]) by the table's angles."""
    cos, sin = table
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def rotate_on_gpu(
    x: Float[Array, "batch tokens heads head_dim"], table: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """`rotate`, written so that XLA's GPU compiler fuses it with what is before and behind.

    The swapped pairs are one operand of an elementwise sum; halves that are stacked begin a kernel
    of their own, and their float32 input is written to memory. On a TPU the halves take less.
    """
    cos, sin = (part[..., None] for part in table)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    signed = sin * jnp.array([-1.0, 1.0], sin.dtype)
    return (pairs * cos + pairs[..., ::-1] * signed).reshape(x.shape)
