"""What a compiled update depends on (`Recipe`), and what may change from call to call (`Knobs`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from linvideo_jax.errors import UserError, check_accumulate, check_counts
from linvideo_jax.models import remat
from linvideo_jax.models.layout import WHOLE, Layout
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.optimizers import OPTIMIZERS
from linvideo_jax.transfer import scores

# Each is described in docs/method.md and is one function of objectives.py or samples.py.
OBJECTIVES = ("adm", "adm_score", "mse", "own_points", "dmd")
WITH_SCORE_NETWORK = ("adm_score", "dmd")
ONLY_VELOCITY = ("mse", "own_points")  # the others need it for the anchor alone
CHOICES = {
    "objective": OBJECTIVES,
    "t_to": ("next", "uniform"),
    "weighting": ("paper", "clipped"),
    "optimizer": OPTIMIZERS,
    "remat": remat.POLICIES,
}
COUNTS = ("batch_size", "accumulate", "score_updates", "rollout_steps")


@dataclass(frozen=True)
class Recipe:
    """Static: another value is another program. Rows that differ in `Knobs` alone share one.

    dtype: of the matrix products; sampler, sigmas: of the teacher's trajectories; velocity: where
    the teacher's velocity at x_t' comes from: "stored", the "teacher" (one forward more), or
    "unused"; num_points: samples of a batch that keep a point of the student's, a multiple of the
    blocks in which it lies (`own_points`); layout: of the mesh, None on one device; the rest are
    fields of `config.transfer`.
    """

    student: WanConfig
    teacher: WanConfig
    sampler: str
    dtype: np.dtype
    sigmas: tuple[float, ...]
    velocity: str
    objective: str
    t_to: str
    weighting: str
    optimizer: str
    remat: str
    batch_size: int
    accumulate: int
    clip_norm: float
    weight_decay: float
    score_updates: int
    rollout_steps: int
    num_points: int
    layout: Layout | None = None

    @classmethod
    def of(
        cls,
        settings,
        student: WanConfig,
        teacher: WanConfig,
        sampler: str,
        dtype,
        *,
        sigmas: Sequence[float],
        store_velocity: str = "both",
        layout: Layout | None = None,
    ) -> "Recipe":
        """From `config.transfer`, and `config.collect.store_velocity`, what the pairs hold.

        UserError for a choice that is unknown, a count below 1, a batch that `accumulate` does not
        divide, a share of own points that is none, a remat that this backend lacks, or velocities
        that are needed and neither stored nor to be had.
        """
        for name, known in CHOICES.items():
            if settings[name] not in known:
                raise UserError(
                    f"transfer.{name} is {settings[name]!r}: choose one of {', '.join(known)}."
                )
        check_counts("transfer", settings, COUNTS)
        check_accumulate("transfer", settings)
        if not 0 < settings.own_share <= 1:
            raise UserError(
                f"transfer.own_share is {settings.own_share}: choose a share of the batch above 0, "
                "at most 1."
            )
        if not remat.available(settings.remat):
            raise UserError(
                f"transfer.remat is {settings.remat!r}, but this backend has no host memory for "
                "it: choose full."
            )
        fields = (*CHOICES, *COUNTS, "clip_norm", "weight_decay")
        own = {name: settings[name] for name in fields}
        own |= {"sigmas": tuple(map(float, sigmas))}
        own |= {"velocity": velocity_of(settings, store_velocity)}
        own |= {"num_points": points_of(settings, layout)}
        return cls(student, teacher, sampler, np.dtype(dtype), **own, layout=layout)

    @property
    def steps(self) -> int:
        """Of the grid: pairs of one video."""
        return len(self.sigmas) - 1

    @property
    def has_score_network(self) -> bool:
        """Whether the objective trains a network beside the student."""
        return self.objective in WITH_SCORE_NETWORK

    @property
    def forwards(self) -> float:
        """Forwards of a network a sample and update, a backward pass counted as two of them."""
        return passes(self).total


class Passes(NamedTuple):
    """Passes of one update through each network, for one sample of its batch.

    *_gradients: forward and backward; the others forward alone.
    """

    student: float
    student_gradients: int
    teacher: float
    score: int
    score_gradients: int

    @property
    def total(self) -> float:
        """In forwards: a backward pass costs two."""
        gradients = self.student_gradients + self.score_gradients
        return self.student + self.teacher + self.score + 3 * gradients


def points_of(settings, layout: Layout | None) -> int:
    """`Recipe.num_points`: a share `own_share` of each block of the batch, rounded up.

    Every block, one of several devices', has as many; what is rounded up is drawn off again
    (`samples.own_points`). 0 for other objectives.
    """
    if settings.objective != "own_points":
        return 0
    blocks = (layout or WHOLE).blocks(settings.batch_size)
    return blocks * math.ceil(round(settings.own_share * settings.batch_size / blocks, 6))


def passes(recipe: Recipe) -> Passes:
    """Those of `training.update` (table of objectives.py).

    What `remat`, or the backward pass of a rollout, computes anew is not counted.
    """
    steps, share = recipe.rollout_steps, recipe.num_points / recipe.batch_size
    own = {
        "adm": Passes(1, 1, 1, 0, 0),
        "adm_score": Passes(0, 1, 1, 1, 0),
        "mse": Passes(0, 1, 0, 0, 0),
        "own_points": Passes(2 * share, 1, share, 0, 0),
        "dmd": Passes(0, steps, 1, 1, 0),
    }[recipe.objective]
    if recipe.velocity == "teacher":  # asked at all samples, of own points or not
        own = own._replace(teacher=1 if recipe.objective == "own_points" else own.teacher + 1)
    updates = recipe.score_updates if recipe.objective in WITH_SCORE_NETWORK else 0
    critic = Passes(steps, 0, 0, 0, 1)
    return Passes(*(a + updates * b for a, b in zip(own, critic, strict=True)))


def velocity_of(settings, store_velocity: str) -> str:
    """`Recipe.velocity`: stored if it can be, else as cheap as may be."""
    if store_velocity == "both" or (store_velocity == "cond" and not settings.negative_fraction):
        return "stored"
    if settings.objective not in ONLY_VELOCITY and not settings.beta:
        return "unused"
    if store_velocity == "cond":
        raise UserError(
            f"collect.store_velocity is 'cond', but transfer.negative_fraction is "
            f"{settings.negative_fraction}, and those samples need the negative prompt's velocity: "
            "choose store_velocity 'both' or 'none', or negative_fraction 0."
        )
    return "teacher"


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
    ema_decay: float
    ema_age: int  # updates that the moving average has seen


def knobs_at(
    settings, step: int, learning_rate: float, guidance_scale: float, selecting: bool
) -> Knobs:
    """The knobs of a step of the run; `selecting`: whether the scores still move."""
    duration = max(settings.round_at - settings.warmup_steps, 1)
    alpha = scores.annealed_alpha((step - settings.warmup_steps) / duration, *settings.alpha)
    # The average begins anew where the layers are placed: before, they were another model's.
    begun = settings.warmup_steps
    if settings.selection == "selective" and not selecting:
        begun = settings.round_at
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
        ema_decay=settings.ema_decay,
        ema_age=max(step - begun, 0),
    )
