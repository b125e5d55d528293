"""Time grids of a sampler: sigmas from noise (near 1) to data (0), made on the host in float64."""

import numpy as np
from jaxtyping import Float

from linvideo_jax.flow.rectified import shift_time

TRAIN_TIMESTEPS = 1000


def sigma_grid(
    num_inference_steps: int, flow_shift: float, kind: str = "diffusers"
) -> Float[np.ndarray, " steps+1"]:
    """Sigmas of `num_inference_steps` steps, falling, the last one 0.

    Args:
      num_inference_steps: 1 or more.
      flow_shift: above 0; 1 leaves the grid even.
      kind: "diffusers" as UniPCMultistepScheduler with flow sigmas builds it (1 to 0.001, the
        first one 1e-6 below 1), "original" as Wan's fm_solvers_unipc.py (0.999 to 0).

    Raises:
      ValueError: an unknown kind, no step, or a shift that is not positive.
    """
    if num_inference_steps < 1 or flow_shift <= 0:
        raise ValueError(f"need steps >= 1 and shift > 0, got {num_inference_steps}, {flow_shift}")
    ranges = {"diffusers": (1, 1 / TRAIN_TIMESTEPS), "original": (1 - 1 / TRAIN_TIMESTEPS, 0)}
    if kind not in ranges:
        raise ValueError(f"unknown kind of grid {kind!r}; known: {', '.join(ranges)}")
    sigmas = shift_time(np.linspace(*ranges[kind], num_inference_steps + 1), flow_shift)
    sigmas[0] = min(sigmas[0], 1 - 1e-6)
    sigmas[-1] = 0
    return sigmas


def network_timesteps(
    sigmas: Float[np.ndarray, " steps+1"], sampler: str
) -> Float[np.ndarray, " steps"]:
    """The time that the network is told at each step: 1000 sigma, float32.

    With "unipc" cut to a whole number, as Wan's own code and diffusers' UniPC do; the states move
    by the exact sigmas all the same.
    """
    timesteps = sigmas[:-1] * TRAIN_TIMESTEPS
    return (np.trunc(timesteps) if sampler == "unipc" else timesteps).astype(np.float32)
