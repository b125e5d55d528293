"""Where an update is made: samples of the stored pairs, and points on the student's own way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from linvideo_jax.flow import rectified
from linvideo_jax.transfer.recipe import Knobs, Recipe

# The collection on the device (`stages/transfer.py` `on_device`): `trajectories.Pairs` by field,
# `starts` (the pairs that are noise), `sigmas` of the grid, and the text of all prompts.
Data = dict[str, jax.Array]


class Batch(NamedTuple):
    """Samples of the stored pairs, each drawn for the conditional or the negative branch."""

    x: Float[Array, "batch frames height width channels"]
    u_teacher: Float[Array, "batch frames height width channels"]
    t_from: Float[Array, " batch"]
    t_to: Float[Array, " batch"]  # a lower step of the grid
    text: Float[Array, "batch tokens text_dim"]
    text_lengths: Int[Array, " batch"]


def draw(data: Data, recipe: Recipe, negative_fraction, key: jax.Array) -> Batch:
    """`recipe.batch_size` pairs, a share `negative_fraction` of them on the negative branch.

    t_to "next": the next lower step of the grid. "uniform": any lower step above 0 alike; below
    the lowest such step there is 0 alone.
    """
    pick, branch = jax.random.split(key)  # fold_in(key, 0) and (key, 1)
    rows = jax.random.randint(pick, (recipe.batch_size,), 0, data["step"].shape[0])
    negative = jax.random.bernoulli(branch, negative_fraction, rows.shape)
    index = data["step"][rows]
    x, u_cond, u_neg = (data[name][rows].astype(jnp.float32) for name in ("x", "u_cond", "u_neg"))
    following = index + 1
    if recipe.t_to == "uniform":
        below = jnp.maximum(data["sigmas"].shape[0] - 1 - following, 1)
        following += jax.random.randint(jax.random.fold_in(key, 2), rows.shape, 0, below)
    return Batch(
        x,
        jnp.where(_wide(negative, x), u_neg, u_cond),
        data["sigmas"][index],
        data["sigmas"][following],
        *_texts(data, data["prompt"][rows], negative),
    )


def _wide(values: Array, like: Array) -> Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _texts(data: Data, prompt: Int[Array, " batch"], negative: Bool[Array, " batch"]):
    text, lengths = data["text"][prompt], data["text_lengths"][prompt]
    return (
        jnp.where(_wide(negative, text), data["negative_text"], text),
        jnp.where(negative, data["negative_length"], lengths),
    )


def noise_and_times(
    data: Data, like: Float[Array, "batch frames height width channels"], key: jax.Array
) -> tuple[Float[Array, "batch frames height width channels"], Float[Array, " batch"]]:
    """Fresh noise, and times of the grid above 0, each alike: for what noises the student's x_0."""
    first, second = jax.random.split(key)
    step = jax.random.randint(second, like.shape[:1], 0, data["sigmas"].shape[0] - 1)
    return jax.random.normal(first, like.shape), data["sigmas"][step]


def network_time(t: Float[Array, " batch"], sampler: str) -> Float[Array, " batch"]:
    """What the network is told at t, as `grids.network_timesteps` tells it when sampling."""
    return jnp.floor(1000.0 * t) if sampler in ("unipc", "dpm++") else 1000.0 * t


class Points(NamedTuple):
    """States on the student's own guided trajectories; part of the training state.

    step: of the grid, of the last move's end; age: moves since the state was a stored one.
    """

    x: Float[Array, "batch frames height width channels"]
    step: Int[Array, " batch"]
    prompt: Int[Array, " batch"]
    age: Int[Array, " batch"]


def no_points(data: Data, batch_size: int) -> Points:
    """Points that the first move begins anew."""
    x = jnp.zeros((batch_size, *data["x"].shape[1:]), jnp.float32)
    last = jnp.full(batch_size, data["sigmas"].shape[0] - 2, jnp.int32)
    return Points(x, last, jnp.zeros_like(last), jnp.zeros_like(last))


def move(
    points: Points, data: Data, velocity: Callable[..., Array], knobs: Knobs, key: jax.Array
) -> Points:
    """Every point makes one guided Euler step of the student along the grid.

    After `own_steps` moves, or at the lowest step above 0, a point begins anew at a stored pair;
    with `own_steps` of the grid's length or more it begins at noise and so visits a whole
    trajectory of the student's, noise included. So 1 is the student's next point, a few more are
    points a few steps on, and each costs the same. velocity(x, t, text, text_lengths).
    """
    last = data["sigmas"].shape[0] - 2
    whole = knobs.own_steps > last
    over = (points.age >= knobs.own_steps) | (points.step >= last)
    anywhere, start = jax.random.split(key)
    rows = jnp.where(
        whole,
        jax.random.choice(start, data["starts"], over.shape),
        jax.random.randint(anywhere, over.shape, 0, data["step"].shape[0]),
    )
    fresh = Points(
        data["x"][rows].astype(jnp.float32), data["step"][rows], data["prompt"][rows], 0 * rows
    )
    points = _where(over, fresh, points)
    moves = ~(over & whole) & (points.step < last)

    t = data["sigmas"][points.step]
    branches = [_texts(data, points.prompt, jnp.full_like(over, side)) for side in (False, True)]
    text, lengths = (jnp.concatenate(both) for both in zip(*branches, strict=True))
    twice = (jnp.concatenate([values, values]) for values in (points.x, t))
    u_cond, u_neg = jnp.split(velocity(*twice, text, lengths), 2)
    guided = rectified.guided(u_cond, u_neg, knobs.guidance_scale)
    dt = data["sigmas"][points.step + 1] - t
    moved = Points(
        points.x + _wide(dt, points.x) * guided, points.step + 1, points.prompt, points.age + 1
    )
    return jax.lax.stop_gradient(_where(moves, moved, points))


def own_points(
    batch: Batch,
    points: Points,
    data: Data,
    teacher: Callable[..., Array],
    knobs: Knobs,
    key: jax.Array,
) -> Batch:
    """The batch with a share `own_share` of its samples at the student's own points.

    There the teacher is asked for its velocity, of the conditional or the negative branch as in
    `draw`. teacher(x, t, text, text_lengths).
    """
    branch, share = jax.random.split(key)
    negative = jax.random.bernoulli(branch, knobs.negative_fraction, points.step.shape)
    t = data["sigmas"][points.step]
    texts = _texts(data, points.prompt, negative)
    own = Batch(points.x, teacher(points.x, t, *texts), t, batch.t_to, *texts)
    return _where(jax.random.bernoulli(share, knobs.own_share, negative.shape), own, batch)


def _where(chosen: Bool[Array, " batch"], yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(_wide(chosen, a), a, b), yes, no)
