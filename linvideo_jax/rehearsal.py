"""A configuration's update without its files: shapes to compile it, random values to run it.

`--plan`, the stage smoke and benchmarks/wan_step.py share it. No checkpoint and no pairs are read:
the sizes are those of `config.model`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from convert.sources import SAMPLING
from linvideo_jax import pipeline
from linvideo_jax.data.texts import Text
from linvideo_jax.data.trajectories import Head
from linvideo_jax.errors import UserError
from linvideo_jax.flow import grids
from linvideo_jax.metrics import flops
from linvideo_jax.metrics.step_flops import Size
from linvideo_jax.models import registry, wan
from linvideo_jax.models.module import shapes
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.layout import layout_of
from linvideo_jax.parallel.placement import exchange_of
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe, knobs_at
from linvideo_jax.transfer.samples import Draw

Tree = Any


@dataclass(frozen=True)
class Problem:
    """What a configuration trains: sizes of the model and of a video, and how the teacher samples.

    latent_shape: [frames, height, width, channels].
    """

    models: registry.ModelSizes
    sampling: dict[str, Any]
    latent_shape: tuple[int, int, int, int]

    @property
    def size(self) -> Size:
        """Tokens of a video, and of its text with the pads that Wan attends to."""
        return Size(flops.video_tokens(self.models.transformer, self.latent_shape))

    @property
    def text_shape(self) -> tuple[int, int]:
        """[tokens, text_dim] of a text embedding, the longest that there is."""
        return self.size.text_tokens, self.models.transformer.text_dim


def problem(config) -> Problem:
    """From `config.model` and what the collect stage samples, or the stage distill.

    A height, width or num_frames that their `sampling` does not give is evaluate's, or else the
    model's own; the rest is diffusers' default. UserError for a configuration with neither a
    transfer nor a distill stage.
    """
    distils = "distill" in config.stages
    if not distils and ("transfer" not in config or "collect" not in config):
        raise UserError(
            "this configuration has neither a transfer nor a distill stage, and only these are "
            "planned: choose one that has, such as configs/wan14b.py."
        )
    models = registry.sizes(config.model)
    sampled = config.distill if distils else config.collect
    given, other = sampled.sampling.to_dict(), config.get("evaluate") or {}
    sampling, names = SAMPLING | given, ("height", "width", "num_frames")
    for name, own in zip(names, models.video, strict=True):
        sampling[name] = given.get(name) or other.get(name) or own
    sides = (sampling[name] for name in names)
    latent_shape = pipeline.latent_shape(models.transformer, models.vae, *sides)
    return Problem(models, sampling, latent_shape)


def recipe(config, given: Problem, mesh: Mesh | AbstractMesh) -> Recipe:
    """The recipe of stage transfer; UserError as `Recipe.of` and `layout_of`."""
    teacher, sampling = given.models.transformer, given.sampling
    names = ("num_inference_steps", "flow_shift", "time_grid", "sampler")
    return Recipe.of(
        config.transfer,
        training.student_config(teacher, config.transfer.feature_map),
        teacher,
        sampling["sampler"],
        config.dtype,
        sigmas=grids.sigma_grid(*(sampling[name] for name in names)),
        store_velocity=config.collect.store_velocity,
        layout=layout_of(mesh, teacher.num_attention_heads, exchange_of(config)),
    )


def arguments(config, made: Recipe, given: Problem, mesh: Mesh) -> tuple[Tree, ...]:
    """(state, teacher_params, batch, knobs, key) of `training.update` as ShapeDtypeStructs.

    Each says where it lies on the mesh, as in a run: weights by the table, samples over the batch.
    """
    settings = config.transfer
    weights = shapes(wan.WanTransformer, made.teacher)

    def state(weights):
        own = training.initial_state(settings, made.student, weights)
        sample = given.latent_shape, given.text_shape
        return own | training.objectives_state(made, weights, *sample)

    teacher = jax.eval_shape(lambda params: training.frozen(params, made.dtype), weights)
    knobs = knobs_at(settings, 0, settings.learning_rate, 1.0, True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return (
        by_table(jax.eval_shape(state, weights), mesh),
        by_table(teacher, mesh),
        by_batch(batch(config, made, given), mesh, made.batch_size),
        *everywhere((knobs, key), mesh),
    )


def by_table(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes of a state or of weights, shared over the mesh as in a run."""
    return jax.tree.map(_at, rules.shardings(tree, mesh), tree)


def by_batch(tree: Tree, mesh: Mesh, batch_size: int) -> Tree:
    """Shapes of a batch, each chip with its samples."""
    sharding = meshes.batch_sharding(mesh, batch_size)
    return jax.tree.map(lambda leaf: _at(sharding, leaf), tree)


def everywhere(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes of numbers and keys that every chip has; numbers of Python count as arrays."""
    sharding = meshes.replicated(mesh)

    def at(leaf):
        if not hasattr(leaf, "dtype"):
            leaf = jax.ShapeDtypeStruct((), jnp.result_type(leaf))
        return _at(sharding, leaf)

    return jax.tree.map(at, tree)


def _at(sharding: NamedSharding, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class _Pairs:
    """As `data.trajectories.Pairs` and its texts: one state and one velocity."""

    def __init__(self, given: Problem, dtype: Any, steps: int, rng: np.random.Generator | None):
        self._rng, self._steps = rng, steps
        self._x, self._u = (self._array(given.latent_shape, jnp.bfloat16) for _ in range(2))
        self._text = Text(self._array(given.text_shape, dtype), np.int32(given.text_shape[0]))
        self.texts = self

    negative = 0

    def _array(self, shape, dtype):
        if self._rng is None:
            return np.broadcast_to(np.zeros((), dtype), shape)
        return self._rng.standard_normal(shape, np.float32).astype(dtype)

    def another(self, row, rng):
        return row

    def x(self, row):
        return Head(0, 0, row % self._steps), self._x

    def velocity(self, row, negative):
        return self._u

    def __getitem__(self, prompt) -> Text:
        return self._text


def batch(config, made: Recipe, given: Problem, rng: np.random.Generator | None = None) -> Tree:
    """A drawn batch: random numbers of `rng`, or ShapeDtypeStructs without."""
    pairs = _Pairs(given, config.dtype, made.steps, rng)
    draw = Draw(pairs, made, config.transfer.negative_fraction, config.transfer.own_steps)
    if rng is None:
        sample = draw(0, np.random.default_rng(0))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((made.batch_size, *np.shape(x)), x.dtype), sample
        )
    drawn = [draw(int(rng.integers(made.steps)), rng) for _ in range(made.batch_size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
