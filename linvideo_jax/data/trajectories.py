"""Pairs of the teacher's sampling trajectories: the data-free training set of the transfer.

A pair is (x_t, t, seed, prompt id, u_cond, u_neg): x_t moves by the guided velocity, u_cond and
u_neg are the teacher's velocities for the prompt and for the negative prompt, without guidance.
On disk a shard holds whole trajectories in bfloat16; `steps` index the grid of sigmas.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing


class Pairs(NamedTuple):
    """Flat pairs; `step` is the index of t in the grid that the teacher was sampled on."""

    x: Float[np.ndarray, "pairs frames height width channels"]
    u_cond: Float[np.ndarray, "pairs frames height width channels"]
    u_neg: Float[np.ndarray, "pairs frames height width channels"]
    step: Int[np.ndarray, " pairs"]
    prompt: Int[np.ndarray, " pairs"]
    seed: Int[np.ndarray, " pairs"]


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` of a collection lies."""
    return Path(folder) / f"pairs-{index:05d}.safetensors"


def write_shard(
    folder: Path,
    index: int,
    x: Float[np.ndarray, "steps videos frames height width channels"],
    u_cond: Float[np.ndarray, "steps videos frames height width channels"],
    u_neg: Float[np.ndarray, "steps videos frames height width channels"],
    prompt: Int[np.ndarray, " videos"],
    seed: Int[np.ndarray, " videos"],
) -> None:
    """Writes whole trajectories as one file of pairs, bfloat16, under a temporary name first."""
    steps, videos = x.shape[:2]

    def flat(values):
        return np.ascontiguousarray(values.reshape(steps * videos, *values.shape[2:]))

    arrays = {
        "x": flat(x).astype(ml_dtypes.bfloat16),
        "u_cond": flat(u_cond).astype(ml_dtypes.bfloat16),
        "u_neg": flat(u_neg).astype(ml_dtypes.bfloat16),
        "step": np.repeat(np.arange(steps, dtype=np.int32), videos),
        "prompt": np.tile(prompt.astype(np.int32), steps),
        "seed": np.tile(seed.astype(np.int32), steps),
    }
    with replacing(shard_path(folder, index)) as temporary:
        save_file(arrays, temporary)


def missing_shards(folder: Path, num_shards: int) -> Iterator[int]:
    """Indices of the shards that are not on disk yet."""
    return (index for index in range(num_shards) if not shard_path(folder, index).exists())


def read_pairs(folder: Path, num_shards: int) -> Pairs:
    """All pairs of a collection; UserError names the shards that are missing or unreadable."""
    parts, bad = [], []
    for index in range(num_shards):
        try:
            parts.append(Pairs(**load_file(shard_path(folder, index))))
        except Exception:  # a missing, truncated or foreign file: all are made again alike
            bad.append(shard_path(folder, index).name)
    if bad:
        raise UserError(
            f"{folder} lacks {', '.join(bad)} or cannot read them: delete what is there of them "
            "and run the collect stage again."
        )
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
