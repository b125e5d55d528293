"""Where an update is made: samples of the teacher's pairs, and points on the student's own way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from linvideo_jax.models.layout import WHOLE
from linvideo_jax.transfer import guidance
from linvideo_jax.transfer.recipe import Knobs, Recipe


class Fresh(NamedTuple):
    """Stored states at which points of the student's begin anew, with both texts."""

    x: Float[Array, "batch frames height width channels"]
    step: Int[Array, " batch"]  # of the grid
    text: Float[Array, "batch tokens text_dim"]
    text_lengths: Int[Array, " batch"]
    negative_text: Float[Array, "batch tokens text_dim"]
    negative_lengths: Int[Array, " batch"]


class Batch(NamedTuple):
    """Samples of the pairs, each drawn for the conditional or the negative branch.

    `Draw` makes one at a time, without the axis batch; every array of a batch has it in front.
    x and u_teacher come in bfloat16; `wide` makes them float32. u_teacher is None where it is not
    stored (`Recipe.velocity`), fresh where the objective has no points, and others where it has no
    score network, whose samples they are: with an axis score_updates behind batch.
    """

    x: Float[Array, "batch frames height width channels"]
    u_teacher: Float[Array, "batch frames height width channels"] | None
    t_from: Float[Array, " batch"]
    t_to: Float[Array, " batch"]  # a lower step of the grid
    text: Float[Array, "batch tokens text_dim"]
    text_lengths: Int[Array, " batch"]
    fresh: Fresh | None = None
    others: "Batch | None" = None


class Draw:
    """draw(row, rng): a sample out of a row of the pairs, on the host.

    A share `negative_fraction` is of the negative branch. t_to "next": the next lower step of the
    grid. "uniform": any lower step above 0 alike; below the lowest such step there is 0 alone.
    pairs: as `data.trajectories.Pairs`. own_steps: of `Knobs`; with the grid's length or more,
    points begin at noise, else at any pair.
    """

    def __init__(self, pairs: Any, recipe: Recipe, negative_fraction: float, own_steps: int):
        self._pairs, self._recipe = pairs, recipe
        self._negative_fraction = negative_fraction
        self._whole = own_steps >= recipe.steps

    def __call__(self, row: int, rng: np.random.Generator) -> Batch:
        recipe, fresh, others = self._recipe, None, None
        sample = self._sample(row, rng, recipe.velocity == "stored")
        if recipe.objective == "own_points":
            fresh = self._fresh(self._pairs.another(row, rng))
        if recipe.has_score_network:
            rows = [self._pairs.another(row, rng) for _ in range(recipe.score_updates)]
            drawn = [self._sample(other, rng, False) for other in rows]
            others = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        return sample._replace(fresh=fresh, others=others)

    def _sample(self, row: int, rng: np.random.Generator, with_velocity: bool) -> Batch:
        sigmas = self._recipe.sigmas
        head, x = self._pairs.x(row)
        negative = bool(rng.random() < self._negative_fraction)
        following = head.step + 1
        if self._recipe.t_to == "uniform":
            following += int(rng.integers(max(self._recipe.steps - following, 1)))
        texts = self._pairs.texts
        return Batch(
            x,
            self._pairs.velocity(row, negative) if with_velocity else None,
            np.float32(sigmas[head.step]),
            np.float32(sigmas[following]),
            *texts[texts.negative if negative else head.prompt],
        )

    def _fresh(self, row: int) -> Fresh:
        if self._whole:
            row -= row % self._recipe.steps  # to the noise of the same video
        (head, x), texts = self._pairs.x(row), self._pairs.texts
        return Fresh(x, np.int32(head.step), *texts[head.prompt], *texts[texts.negative])


def wide(batch: Any) -> Any:
    """The same with bfloat16 arrays in float32, which all sums are made in."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, batch)


def _wide(values: Array, like: Array) -> Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def noise_and_times(
    sigmas: tuple[float, ...],
    like: Float[Array, "batch frames height width channels"],
    key: jax.Array,
) -> tuple[Float[Array, "batch frames height width channels"], Float[Array, " batch"]]:
    """Fresh noise, and times of the grid above 0, each alike: for what noises the student's x_0."""
    first, second = jax.random.split(key)
    step = jax.random.randint(second, like.shape[:1], 0, len(sigmas) - 1)
    return jax.random.normal(first, like.shape), jnp.asarray(sigmas, jnp.float32)[step]


def network_time(t: Float[Array, " batch"], sampler: str) -> Float[Array, " batch"]:
    """What the network is told at t, as `grids.network_timesteps` tells it when sampling."""
    return jnp.floor(1000.0 * t) if sampler in ("unipc", "dpm++") else 1000.0 * t


class Points(NamedTuple):
    """States on the student's own guided trajectories; part of the training state.

    There is room for one of every sample of a batch, so that a state fits any mesh; an update moves
    those of `with_points`. step: of the grid, of the last move's end; age: moves since the state
    was a stored one; text: of the prompt.
    """

    x: Float[Array, "batch frames height width channels"]
    step: Int[Array, " batch"]
    text: Float[Array, "batch tokens text_dim"]
    text_lengths: Int[Array, " batch"]
    age: Int[Array, " batch"]


def no_points(recipe: Recipe, latent_shape: Sequence[int], text_shape: Sequence[int]) -> Points:
    """Points that the first move begins anew."""

    def zeros(shape, dtype=jnp.float32):
        return jnp.zeros((recipe.batch_size, *shape), dtype)

    none, last = zeros((), jnp.int32), zeros((), jnp.int32) + recipe.steps - 1
    return Points(zeros(latent_shape), last, zeros(text_shape), none, jnp.copy(none))


def _in_blocks(recipe: Recipe, leaf: Array) -> Array:
    blocks = (recipe.layout or WHOLE).blocks(recipe.batch_size)
    return leaf.reshape(blocks, -1, *leaf.shape[1:])


def with_points(recipe: Recipe, batch: Any) -> Any:
    """Of a batch, or of its points, those that are moved: the first ones of each block."""

    def first(leaf):
        blocks = _in_blocks(recipe, leaf)
        return blocks[:, : recipe.num_points // len(blocks)].reshape(-1, *leaf.shape[1:])

    return jax.tree.map(first, batch)


def replaced(recipe: Recipe, batch: Any, others: Any) -> Any:
    """The batch with others in the place of `with_points(recipe, batch)`."""

    def joined(leaf, other):
        leaf, other = (_in_blocks(recipe, one) for one in (leaf, other))
        joined = jnp.concatenate([other, leaf[:, other.shape[1] :]], axis=1)
        return joined.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(joined, batch, others)


def move(
    points: Points, fresh: Fresh, recipe: Recipe, velocity: Callable[..., Array], knobs: Knobs
) -> Points:
    """Every point makes one guided Euler step of the student along the grid.

    After `own_steps` moves, or at the lowest step above 0, a point begins anew at a stored pair;
    with `own_steps` of the grid's length or more it begins at noise and so visits a whole
    trajectory of the student's, noise included. So 1 is the student's next point, a few more are
    points a few steps on, and each costs the same. points, fresh: `with_points` of the state's and
    of the batch's; velocity(x, t, text, text_lengths).
    """
    sigmas, last = jnp.asarray(recipe.sigmas, jnp.float32), recipe.steps - 1
    whole = knobs.own_steps > last
    over = (points.age >= knobs.own_steps) | (points.step >= last)
    anew = Points(fresh.x, fresh.step, fresh.text, fresh.text_lengths, 0 * fresh.step)
    points = _where(over, anew, points)
    moves = ~(over & whole) & (points.step < last)

    t = sigmas[points.step]
    texts = (points.text, points.text_lengths), (fresh.negative_text, fresh.negative_lengths)
    guided = guidance.guided(velocity, *texts, knobs.guidance_scale)(points.x, t)
    dt = sigmas[points.step + 1] - t
    moved = points._replace(
        x=points.x + _wide(dt, points.x) * guided, step=points.step + 1, age=points.age + 1
    )
    return jax.lax.stop_gradient(_where(moves, moved, points))


def own_points(
    batch: Batch,
    points: Points,
    fresh: Fresh,
    recipe: Recipe,
    teacher: Callable[..., Array],
    knobs: Knobs,
    key: jax.Array,
) -> Batch:
    """The batch with a share `own_share` of its samples at the student's own points.

    Only as many samples keep a point as the share needs in whole numbers (`Recipe.num_points`); of
    those a part is drawn, so that the share holds on the mean. At the points the teacher is asked
    for its velocity, of the conditional or the negative branch as in `Draw`; of a batch without
    stored velocities it is left open. batch: without its fresh states; points, fresh: as `move`
    has them; teacher(x, t, text, text_lengths).
    """
    branch, share = jax.random.split(key)
    stored = with_points(recipe, batch)
    negative = jax.random.bernoulli(branch, knobs.negative_fraction, points.step.shape)
    t = jnp.asarray(recipe.sigmas, jnp.float32)[points.step]
    text, lengths = _where(
        negative,
        (fresh.negative_text, fresh.negative_lengths),
        (points.text, points.text_lengths),
    )
    u = None if batch.u_teacher is None else teacher(points.x, t, text, lengths)
    own = stored._replace(x=points.x, u_teacher=u, t_from=t, text=text, text_lengths=lengths)
    part = knobs.own_share * recipe.batch_size / recipe.num_points
    chosen = _where(jax.random.bernoulli(share, part, negative.shape), own, stored)
    return replaced(recipe, batch, chosen)


def _where(chosen: Bool[Array, " batch"], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(_wide(chosen, a), a, b), yes, no)
