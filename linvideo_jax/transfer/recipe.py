"""What a compiled update depends on (`Recipe`), and what may change from call to call (`Knobs`)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from linvideo_jax.errors import UserError
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.transfer import scores

# Each is described in docs/method.md and is one function of objectives.py or samples.py.
OBJECTIVES = ("adm", "adm_score", "mse", "own_points", "dmd")
WITH_SCORE_NETWORK = ("adm_score", "dmd")
CHOICES = {
    "objective": OBJECTIVES,
    "t_to": ("next", "uniform"),
    "weighting": ("paper", "clipped", "normalised"),
}


@dataclass(frozen=True)
class Recipe:
    """Static: another value is another program. Rows that differ in `Knobs` alone share one.

    sampler: of the stored trajectories; dtype: of the matrix products; the rest are fields of
    `config.transfer`.
    """

    student: WanConfig
    teacher: WanConfig
    sampler: str
    dtype: np.dtype
    objective: str
    t_to: str
    weighting: str
    batch_size: int
    remat: bool
    clip_norm: float
    score_updates: int
    rollout_steps: int

    @classmethod
    def of(cls, settings, student: WanConfig, teacher: WanConfig, sampler: str, dtype) -> "Recipe":
        """From `config.transfer`; UserError for a choice that is unknown or a count below 1."""
        for name, known in CHOICES.items():
            if settings[name] not in known:
                raise UserError(
                    f"transfer.{name} is {settings[name]!r}: choose one of {', '.join(known)}."
                )
        counts = ("batch_size", "score_updates", "rollout_steps")
        for name in counts:
            if settings[name] < 1:
                raise UserError(f"transfer.{name} is {settings[name]}: choose 1 or more.")
        fields = (*CHOICES, *counts, "remat", "clip_norm")
        own = {name: settings[name] for name in fields}
        return cls(student, teacher, sampler, np.dtype(dtype), **own)

    @property
    def has_score_network(self) -> bool:
        """Whether the objective trains a network beside the student."""
        return self.objective in WITH_SCORE_NETWORK


class Forwards(NamedTuple):
    """Passes of one update through each network, for one sample of its batch.

    *_gradients: forward and backward; the others forward alone.
    """

    student: int
    student_gradients: int
    teacher: int
    score: int
    score_gradients: int

    @property
    def total(self) -> int:
        """In forwards: a backward pass costs two."""
        gradients = self.student_gradients + self.score_gradients
        return self.student + self.teacher + self.score + 3 * gradients


def forwards(recipe) -> Forwards:
    """The passes of `training.update`, of a Recipe or `config.transfer` (table of objectives.py).

    What `remat` makes anew in the backward pass is not counted, a rollout's second forward is.
    """
    steps = recipe.rollout_steps
    counted = {
        "adm": Forwards(1, 1, 1, 0, 0),
        "adm_score": Forwards(0, 1, 1, 1, 0),
        "mse": Forwards(0, 1, 0, 0, 0),
        "own_points": Forwards(2, 1, 1, 0, 0),
        "dmd": Forwards(steps, steps, 1, 1, 0),
    }[recipe.objective]
    if recipe.objective in WITH_SCORE_NETWORK:
        critic = Forwards(steps, 0, 0, 0, 1)
        counted = Forwards(*(a + recipe.score_updates * b for a, b in zip(counted, critic)))
    return counted


class Knobs(NamedTuple):
    """Runtime arguments of an update: numbers that a table of ablations varies, or that a schedule
    moves. r's start is in the state, the seed in the key."""

    learning_rate: float  # of the weights
    feature_map_rate: float  # times that, for the feature maps
    r_learning_rate: float
    score_learning_rate: float
    alpha: jax.Array | float
    lambda_: float
    beta: float
    target: int
    negative_fraction: float
    freeze_steps: int  # 0: no layer is frozen before `round_at`
    own_steps: int
    own_share: float
    guidance_scale: float


def knobs_at(
    settings, step: int, learning_rate: float, guidance_scale: float, selecting: bool
) -> Knobs:
    """The knobs of a step of the run; `selecting`: whether the scores still move."""
    duration = max(settings.round_at - settings.warmup_steps, 1)
    alpha = scores.annealed_alpha((step - settings.warmup_steps) / duration, *settings.alpha)
    return Knobs(
        learning_rate=learning_rate,
        feature_map_rate=settings.feature_map_rate,
        r_learning_rate=settings.r_learning_rate if selecting else 0.0,
        score_learning_rate=settings.score_learning_rate,
        alpha=alpha,
        lambda_=settings.lambda_,
        beta=settings.beta,
        target=settings.target,
        negative_fraction=settings.negative_fraction,
        freeze_steps=settings.freeze_steps,
        own_steps=settings.own_steps,
        own_share=settings.own_share,
        guidance_scale=guidance_scale,
    )
