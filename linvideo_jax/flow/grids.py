"""Time grids of a sampler: sigmas from noise (near 1) to data (0), made on the host in float64."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from linvideo_jax.flow.rectified import shift_time

TRAIN_TIMESTEPS = 1000
GRIDS = ("diffusers", "original")

# First and last sigma before the shift. "diffusers": UniPCMultistepScheduler and
# DPMSolverMultistepScheduler with flow sigmas, Euler on UniPC's. "original": Wan's
# fm_solvers_unipc.py (whose 0.999 has passed float32) and get_sampling_sigmas of fm_solvers.py;
# Wan has no Euler, but the code around FlowMatchScheduler runs it on the latter.
# "renoise" samples distilled models, whose lists begin at pure noise.
_RANGES = {
    ("diffusers", "unipc"): (1, 1 / TRAIN_TIMESTEPS),
    ("diffusers", "euler"): (1, 1 / TRAIN_TIMESTEPS),
    ("diffusers", "dpm++"): (1 - 1 / TRAIN_TIMESTEPS, 0),
    ("original", "unipc"): (float(np.float32(1 - 1 / TRAIN_TIMESTEPS)), 0),
    ("original", "euler"): (1, 0),
    ("original", "dpm++"): (1, 0),
    ("diffusers", "renoise"): (1, 0),
    ("original", "renoise"): (1, 0),
}


def sigma_grid(
    num_inference_steps: int,
    flow_shift: float,
    kind: str = "diffusers",
    sampler: str = "unipc",
    denoising_steps: Sequence[float] | None = None,
) -> Float[np.ndarray, " steps+1"]:
    """Sigmas of `num_inference_steps` steps, falling, the last one 0.

    Args:
      num_inference_steps: 1 or more.
      flow_shift: above 0; 1 leaves the grid even.
      kind: "diffusers" or "original" (Wan's own code): where the even grid starts and ends.
      sampler: "unipc", "euler" or "dpm++", for which both libraries have grids of their own, or
        "renoise".
      denoising_steps: the list of a distilled model takes the place of count, kind and sampler.

    Raises:
      ValueError: an unknown kind or sampler, no step, or a shift that is not positive.
    """
    if denoising_steps is not None:
        return warped(denoising_steps, flow_shift)
    if num_inference_steps < 1 or flow_shift <= 0:
        raise ValueError(f"need steps >= 1 and shift > 0, got {num_inference_steps}, {flow_shift}")
    if (kind, sampler) not in _RANGES:
        raise ValueError(
            f"no grid {kind!r} of {sampler!r}; known: {', '.join(GRIDS)} of unipc, euler, "
            "dpm++, renoise"
        )
    first, last = _RANGES[kind, sampler]
    sigmas = np.linspace(first, last, num_inference_steps + 1)
    if (kind, sampler) == ("diffusers", "dpm++"):
        # Equal but for the last bit, on which it depends what a cut to whole steps gives.
        sigmas = 1 - np.linspace(1, 1 / TRAIN_TIMESTEPS, num_inference_steps + 1)[::-1]
    sigmas = shift_time(sigmas, flow_shift)
    if kind == "diffusers" and sampler != "renoise":
        sigmas[0] = min(sigmas[0], 1 - 1e-6)
    sigmas[-1] = 0
    return sigmas


def warped(denoising_steps: Sequence[float], flow_shift: float) -> Float[np.ndarray, " steps+1"]:
    """Sigmas of a distilled model's list of timesteps, with a 0 behind them.

    The list counts timesteps before the shift, from 1000 down, so that one list serves every shift
    (`warp_denoising_step` of CausVid and Self-Forcing): 1000, 750, 500, 250 are 1000, 937.5, 833.3,
    625 with shift 5. A list of timesteps that the network is told as they stand goes with shift 1.
    """
    sigmas = np.asarray(denoising_steps, np.float64) / TRAIN_TIMESTEPS
    return np.append(shift_time(sigmas, flow_shift), 0.0)


def network_timesteps(
    sigmas: Float[np.ndarray, " steps+1"], sampler: str
) -> Float[np.ndarray, " steps"]:
    """The time that the network is told at each step: 1000 sigma, float32.

    With "unipc" and "dpm++" cut to a whole number, as Wan's own code and diffusers do; the states
    move by the exact sigmas all the same.
    """
    timesteps = sigmas[:-1] * TRAIN_TIMESTEPS
    whole = sampler in ("unipc", "dpm++")
    return (np.trunc(timesteps) if whole else timesteps).astype(np.float32)
