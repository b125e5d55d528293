"""A configuration's update without its files: shapes to compile it, random values to run it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from convert.sources import SAMPLING
from linvideo_jax import pipeline
from linvideo_jax.errors import UserError
from linvideo_jax.metrics import flops
from linvideo_jax.metrics.step_flops import Size
from linvideo_jax.models import registry, wan
from linvideo_jax.models.module import shapes
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.layout import layout_of
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe, knobs_at

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


def problem(config) -> Problem:
    """From `config.model` and the sizes of its collect stage; no checkpoint is read.

    What `collect.sampling` does not say of height, width and num_frames is evaluate's. UserError
    for a configuration without a transfer stage, or without these sizes.
    """
    if "transfer" not in config.get("stages", ()) or "transfer" not in config:
        raise UserError(
            "this configuration has no transfer stage, and nothing else is planned: choose one "
            "whose stages name it, such as configs/wan14b.py."
        )
    models = registry.sizes(config.model)
    given = config.collect.sampling.to_dict() if "collect" in config else {}
    other = config.get("evaluate") or {}
    sampling = SAMPLING | given
    for name in ("height", "width", "num_frames"):
        sampling[name] = given.get(name) or other.get(name)
        if not sampling[name]:
            raise UserError(f"collect.sampling gives no {name}: add it to the configuration.")
    side = (sampling[name] for name in ("height", "width", "num_frames"))
    latents = pipeline.latent_shape(models.transformer, models.vae, *side)
    return Problem(models, sampling, latents)


def recipe(config, given: Problem, mesh: Mesh | AbstractMesh) -> Recipe:
    """The recipe of stage transfer; UserError as `Recipe.of` and `layout_of`."""
    teacher = given.models.transformer
    student = training.student_config(teacher)
    exchange = (config.get("mesh") or {}).get("exchange", "auto")
    layout = layout_of(mesh, teacher.num_attention_heads, exchange)
    sampler = given.sampling["sampler"]
    return Recipe.of(config.transfer, student, teacher, sampler, config.dtype, layout)


def arguments(config, made: Recipe, given: Problem) -> tuple[Tree, ...]:
    """(state, teacher_params, data, knobs, key) of `training.update`, as ShapeDtypeStructs."""
    settings = config.transfer
    teacher = shapes(wan.WanTransformer, made.teacher)
    state = jax.eval_shape(lambda p: training.initial_state(settings, made.student, p), teacher)
    data = _data(made, given)
    state |= jax.eval_shape(lambda p, d: training.objectives_state(made, p, d), teacher, data)
    knobs = knobs_at(settings, 0, settings.learning_rate, 1.0, True)
    knobs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.result_type(x)), knobs)
    return state, teacher, data, knobs, jax.eval_shape(lambda: jax.random.key(0))


def _data(made: Recipe, given: Problem) -> Tree:
    batch, channels = made.batch_size, given.latent_shape
    text = (given.size.text_tokens, given.models.transformer.text_dim)
    video = jax.ShapeDtypeStruct((batch, *channels), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return {
        "x": video,
        "u_cond": video,
        "u_neg": video,
        "step": index,
        "prompt": index,
        "seed": index,
        "starts": index,
        "sigmas": jax.ShapeDtypeStruct((51,), jnp.float32),
        "text": jax.ShapeDtypeStruct((batch, *text), jnp.float32),
        "text_lengths": index,
        "negative_text": jax.ShapeDtypeStruct((1, *text), jnp.float32),
        "negative_length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }


def placed(arguments: tuple[Tree, ...], mesh: Mesh) -> tuple[Tree, ...]:
    """The shapes with where the run keeps them: weights by the table, samples over the batch."""
    state, teacher, data, knobs, key = arguments
    everywhere = meshes.replicated(mesh)

    def at(sharding):
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def by_rules(tree):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            rules.shardings(tree, mesh),
        )

    rest = jax.tree.map(at(everywhere), (knobs, key))
    return by_rules(state), by_rules(teacher), jax.tree.map(at(everywhere), data), *rest
