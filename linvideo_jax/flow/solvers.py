"""Solvers of the sampling equation as tables of coefficients, run by one scan.

UniPC (order 2, B(h) = expm1, data prediction; Zhao et al. 2023), DPM-Solver++ (2M, midpoint; Lu
et al. 2022) and Euler all build the next state linearly from earlier states and data predictions
m_i = x_i - sigma_i u_i, so a solver is two rows of numbers a step: the corrector's and the
predictor's. Distilled models take a few steps by Euler, or by "renoise", which adds fresh noise to
m_i.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

SAMPLERS = ("unipc", "euler", "dpm++", "renoise")
FEW_STEP_SAMPLERS = ("renoise", "euler")


class SolverTable(NamedTuple):
    """Coefficients of every step, float64.

    corrector: of (x_i, x_{i-1} corrected, m_i, m_{i-1}, m_{i-2}), giving x_i corrected.
    predictor: of (x_i corrected, m_i, m_{i-1}), giving x_{i+1}.
    """

    corrector: Float[np.ndarray, "steps 5"]
    predictor: Float[np.ndarray, "steps 3"]


class Trajectory(NamedTuple):
    """Inputs and outputs of the network along a run: `states[i]` is x at `sigmas[i]`."""

    states: Float[Array, "steps ..."]
    velocities: Float[Array, "steps ..."]


def _no_corrector(steps: int) -> Float[np.ndarray, "steps 5"]:
    return np.tile([1.0, 0, 0, 0, 0], (steps, 1))


def euler_table(sigmas: Float[np.ndarray, " steps+1"]) -> SolverTable:
    """x_{i+1} = x_i + (s_{i+1} - s_i) u_i, written with m_i = x_i - s_i u_i."""
    ratio = sigmas[1:] / sigmas[:-1]
    return SolverTable(_no_corrector(len(ratio)), np.stack([ratio, 1 - ratio, 0 * ratio], axis=1))


def renoise_table(sigmas: Float[np.ndarray, " steps+1"]) -> SolverTable:
    """x_{i+1} = (1 - s_{i+1}) m_i + s_{i+1} eps with fresh noise, which `sample` adds: DMD2's."""
    kept = 1 - sigmas[1:]
    return SolverTable(_no_corrector(len(kept)), np.stack([0 * kept, kept, 0 * kept], axis=1))


def renoise_noise(
    keys: Key[Array, " batch"], step: Int[Array, ""] | int, like: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """The fresh noise after step `step`, each sample's from its own key alone."""
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), like.shape[1:]))
    return draw(keys)


def _half_log_snr(sigmas: Float[np.ndarray, " steps+1"]) -> Float[np.ndarray, " steps"]:
    """lam = log(1 - s) - log s of all sigmas but the last, which is 0; -inf at s = 1."""
    # Both sources round the sigmas to float32 before they take logarithms; log(1 - s) of the first
    # one, s = 1 - 1e-6, moves by 1% with that rounding.
    sigmas = sigmas.astype(np.float32).astype(np.float64)[:-1]
    with np.errstate(divide="ignore"):
        return np.log(1 - sigmas) - np.log(sigmas)


def dpm_table(sigmas: Float[np.ndarray, " steps+1"]) -> SolverTable:
    """DPM-Solver++ (2M): first and last step of order 1.

    With lam = log(1 - s) - log s, h = lam_t - lam_s, r = (lam_{s-1} - lam_s) / h and a = 1 - s,
    x_t = (s_t / s_s) x - a_t expm1(-h) (m_s + (m_{s-1} - m_s) / (2 r)).
    The last step, s_t = 0, is its limit m_s.
    """
    lam = _half_log_snr(sigmas)
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    predictor = np.zeros((len(lam), 3))
    predictor[-1, 1] = 1
    for i in range(len(lam) - 1):
        h = lam[i + 1] - lam[i]
        first = -(1 - sigmas[i + 1]) * np.expm1(-h)
        older = 0.5 * h / (lam[i - 1] - lam[i]) if i else 0.0
        predictor[i] = sigmas[i + 1] / sigmas[i], first * (1 - older), first * older
    return SolverTable(_no_corrector(len(lam)), predictor)


def unipc_table(sigmas: Float[np.ndarray, " steps+1"]) -> SolverTable:
    """UniPC of order 2 with bh2: DPM-Solver++'s predictor, and a corrector from step 1 on.

    The corrector goes over the step from s to t again, now that m_t is known: in the terms of
    `dpm_table` x_t = (s_t / s_s) x - a_t expm1(-h) (m_s + rho_1 (m_{s-1} - m_s) / r + rho_2
    (m_t - m_s)), without the term of rho_1 in the first.
    """
    lam = _half_log_snr(sigmas)
    predictor = dpm_table(sigmas).predictor
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    corrector = _no_corrector(len(lam))
    for i in range(len(lam) - 1):  # the step from sigma_i to sigma_{i+1}
        h = lam[i + 1] - lam[i]
        scale = sigmas[i + 1] / sigmas[i]
        first = -(1 - sigmas[i + 1]) * np.expm1(-h)
        if i == 0:
            corrector[i + 1] = 0, scale, first * 0.5, first * 0.5, 0
            continue
        r = (lam[i - 1] - lam[i]) / h
        f1 = np.expm1(-h) / -h - 1
        f2 = f1 / -h - 0.5
        b = np.array([f1, 2 * f2]) / np.expm1(-h)
        rho_1, rho_2 = np.linalg.solve([[1, 1], [r, 1]], b)
        rest = 1 - rho_1 / r - rho_2
        corrector[i + 1] = 0, scale, first * rho_2, first * rest, first * rho_1 / r
    return SolverTable(corrector, predictor)


def sample(
    velocity: Callable[[Float[Array, "..."], Any], Float[Array, "..."]],
    noise: Float[Array, "..."],
    sigmas: Float[np.ndarray, " steps+1"],
    sampler: str = "unipc",
    *,
    trajectory: bool = False,
    has_aux: bool = False,
    times: Any = None,
    keys: Key[Array, " batch"] | None = None,
):
    """Integrates dx/dsigma = velocity from sigmas[0] to sigmas[-1] = 0; works inside jit.

    Args:
      velocity: velocity(x, time) -> array of x's shape; time is a float32 scalar, or a row of
        `times`.
      noise: the state at sigmas[0], float32.
      sigmas: concrete, falling, the last one 0 (`grids.sigma_grid`).
      sampler: "unipc", "euler", "dpm++" or "renoise".
      trajectory: also return what the network saw and said.
      has_aux: `velocity` returns (velocity, anything); also return its anythings, stacked by step.
      times: what `velocity` receives as time, in float32: an array or a tree of arrays with a row
        a step; the sigmas if None.
      keys: of "renoise" alone: one a sample on axis 0, from which its fresh noise is drawn.

    Returns:
      The state at 0, float32, of noise's shape; with `trajectory` the pair (state, Trajectory),
      whose states are those that the velocity was taken at (UniPC's predicted, uncorrected ones);
      with `has_aux` the pair (state, stacked aux).

    Raises:
      ValueError: an unknown sampler, or "renoise" without keys.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if sampler == "renoise" and keys is None:
        raise ValueError("renoise needs a key for each sample")
    tables = {
        "unipc": unipc_table,
        "euler": euler_table,
        "dpm++": dpm_table,
        "renoise": renoise_table,
    }
    table = tables[sampler](sigmas)
    times = sigmas[:-1] if times is None else times

    def step(carry, row):
        x, last, m1, m2 = carry
        sigma, sigma_next, time, c, p, index = row
        v, aux = velocity(x, time) if has_aux else (velocity(x, time), None)
        v = v.astype(jnp.float32)
        m = x - sigma * v
        corrected = c[0] * x + c[1] * last + c[2] * m + c[3] * m1 + c[4] * m2
        following = p[0] * corrected + p[1] * m + p[2] * m1
        if sampler == "renoise":
            following += sigma_next * renoise_noise(keys, index, x)
        return (following, corrected, m, m1), (aux if has_aux else (x, v) if trajectory else None)

    noise = jnp.asarray(noise, jnp.float32)
    rows = (sigmas[:-1], sigmas[1:], times, table.corrector, table.predictor)
    rows = (*(jnp.asarray(a, jnp.float32) for a in rows), jnp.arange(len(times)))
    empty = jnp.zeros_like(noise)
    (x, *_), seen = jax.lax.scan(step, (noise, empty, empty, empty), rows)
    if has_aux:
        return x, seen
    return (x, Trajectory(*seen)) if trajectory else x
