"""Which layers become linear: learned scores (the paper's selective transfer), or chosen before.

Layers count from 0. A selection is a sorted tuple of `target` layers.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from linvideo_jax.errors import UserError
from linvideo_jax.models.wan import LINEAR, MIX, SOFTMAX
from linvideo_jax.transfer import scores

SELECTIONS = ("selective", "manual", "grid", "random")
ROUNDINGS = ("target", "nearest")
FREEZE_WITHIN = 0.02  # of 0 or 1

Profile = dict[str, Any]


def check(settings, num_layers: int) -> None:
    """UserError for a selection of `config.transfer` that this model cannot have."""
    if settings.selection not in SELECTIONS:
        raise UserError(
            f"transfer.selection is {settings.selection!r}: choose one of {', '.join(SELECTIONS)}."
        )
    if not 0 <= settings.target <= num_layers:
        raise UserError(f"transfer.target is {settings.target}: choose 0 to {num_layers}.")
    if settings.rounding not in ROUNDINGS:
        raise UserError(
            f"transfer.rounding is {settings.rounding!r}: choose one of {', '.join(ROUNDINGS)}."
        )
    if settings.selection == "manual":
        _check_layers(tuple(settings.layers), settings.target, num_layers)
    edge = abs(settings.r_init - round(settings.r_init))
    if settings.freeze_steps and edge < FREEZE_WITHIN:
        raise UserError(
            f"transfer.r_init is {settings.r_init}, where transfer.freeze_steps freezes a layer: "
            f"choose one at least {FREEZE_WITHIN} from 0 and 1, or freeze_steps = 0."
        )


def _check_layers(layers: tuple, target: int, num_layers: int) -> None:
    unknown = [layer for layer in layers if layer not in range(num_layers)]
    if unknown:
        raise UserError(
            f"transfer.layers names layer {unknown[0]}: the model has layers 0 to {num_layers - 1}."
        )
    if len(set(layers)) != len(layers) or len(layers) != target:
        raise UserError(
            f"transfer.layers is {layers}: name {target} different layers, as many as "
            "transfer.target says."
        )


def before_training(settings, num_layers: int, profile: Profile | None) -> tuple[int, ...] | None:
    """The layers of a selection that does not learn; None for "selective".

    manual: `layers`. random: `target` layers by `selection_seed`. grid: `by_profile`.
    """
    if settings.selection == "manual":
        return tuple(sorted(settings.layers))
    if settings.selection == "random":
        rng = np.random.default_rng(settings.selection_seed)
        return tuple(sorted(rng.permutation(num_layers)[: settings.target].tolist()))
    if settings.selection == "grid":
        return by_profile(profile, settings.target, num_layers)
    return None


def by_profile(profile: Profile, target: int, num_layers: int) -> tuple[int, ...]:
    """Greedy: whole ranges of the profile in the order of their error after recovery.

    The last range may be cut to reach `target`. UserError if the profile is of another model.
    """
    if profile["num_layers"] != num_layers:
        raise UserError(
            f"the profile is of a model with {profile['num_layers']} layers, this one has "
            f"{num_layers}: run the profile stage again in another --workdir."
        )
    chosen: list[int] = []
    for row in sorted(profile["rows"], key=lambda row: row["error_after"]):
        chosen += [layer for layer in row["layers"] if layer not in chosen]
    return tuple(sorted(chosen[:target]))


def by_scores(
    r: Float[Array, " layers"], mode: Int[Array, " layers"], target: int, rounding: str = "target"
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The `target` layers of smallest r, frozen ones as they are, and what a report tells of it.

    rounding "nearest", for the ablation: the layers with r below 1/2, however many.
    rounded: how many layers rounding alone makes linear; moved: which the rule placed otherwise;
    undecided: scores in (0.05, 0.95).
    """
    r, mode = np.asarray(r), np.asarray(mode)
    settled = np.select([mode == LINEAR, mode == SOFTMAX], [-1.0, 2.0], r)
    count = target if rounding == "target" else int(np.sum(np.round(settled) <= 0))
    layers, moved = scores.choose_linear_layers(settled, count)
    return layers, {
        "scores": r.tolist(),
        "rounded": int(np.sum(np.round(r) == 0)),
        "moved": list(moved),
        "undecided": int(np.sum((r > 0.05) & (r < 0.95))),
    }


def placed(state: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """The state with these layers linear, the others softmax, and every score at 0 or 1."""
    linear = np.isin(np.arange(len(state["r"])), layers)
    return state | {
        "r": jnp.asarray(np.where(linear, 0.0, 1.0), jnp.float32),
        "mode": jnp.asarray(np.where(linear, LINEAR, SOFTMAX), jnp.int32),
    }


def freeze(
    r: Float[Array, " layers"],
    mode: Int[Array, " layers"],
    settled: Int[Array, " layers"],
    target: Int[Array, ""] | int,
    steps: Int[Array, ""] | int,
) -> tuple[Float[Array, " layers"], Int[Array, " layers"], Int[Array, " layers"]]:
    """(r, mode, settled) after an update: layers whose score has settled stay what they are.

    A mixed layer with |r - round(r)| < 0.02 for `steps` updates on end becomes linear or softmax
    for good, and no longer computes the other branch; `settled` counts those updates. No more than
    `target` layers freeze as linear, nor more than the rest as softmax. steps 0: none freezes.
    """
    near = jnp.abs(r - jnp.round(r)) < FREEZE_WITHIN
    settled = jnp.where(near & (mode == MIX), settled + 1, 0)
    ready = (settled >= steps) & (steps > 0) & (mode == MIX)
    for kind, side, most in ((LINEAR, r < 0.5, target), (SOFTMAX, r >= 0.5, r.size - target)):
        candidates = ready & side
        room = most - jnp.sum(mode == kind)
        mode = jnp.where(candidates & (jnp.cumsum(candidates) <= room), kind, mode)
    return jnp.where(mode == MIX, r, jnp.round(r)), mode, settled
