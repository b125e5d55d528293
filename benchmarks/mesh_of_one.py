"""What the code for meshes costs on one device: part of benchmarks/latency.py.

A run on one device leaves that code out (`parallel.layout.layout_of`); here it is used.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, measure
from configs import smoke
from linvideo_jax import rehearsal
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.layout import MeshLayout
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import knobs_at


def measured(size, dtype, rounds: int, blocks: int) -> dict[str, dict[str, Any]]:
    """Rows of times, the plain ones and those of a mesh, which have their ratio (`to_plain`).

    size: a `latency.Size`; blocks: of the model whose update is timed.
    """
    layout = MeshLayout(meshes.make({}, jax.devices()[:1]), "ulysses")
    rows = measure.interleaved(_forwards(size, dtype, layout), 2 * rounds)
    rows |= measure.interleaved(_updates(size, dtype, layout, blocks), rounds)
    for what in ("forward", "update"):
        plain, other = (rows[f"{what}, {name}"] for name in ("plain", "mesh of one"))
        other["to_plain"] = other["seconds"] / plain["seconds"]
    return rows


def _forwards(size, dtype, layout: MeshLayout) -> dict[str, Callable[[], Any]]:
    """Of LinVideo."""
    ours = contenders.Ours(size.models.transformer, dtype)
    inputs = (*ours.inputs(size.shape), jnp.asarray(ours.mode(size.rows()["LinVideo"])))
    options = {"config": ours.config, "dtype": dtype}

    def program(layout):
        return contenders.velocity.lower(*inputs, **options, layout=layout).compile()

    return _both("forward", program, layout, inputs)


def _updates(size, dtype, layout: MeshLayout, blocks: int) -> dict[str, Callable[[], Any]]:
    """Of the configuration smoke at this size, every layer mixed."""
    config = smoke.get_config()
    config.dtype, config.transfer.target = str(dtype), 1
    fewer = replace(size.models.transformer, num_layers=blocks)
    problem = replace(
        rehearsal.problem(config),
        models=replace(size.models, transformer=fewer),
        latent_shape=size.shape,
    )
    recipe = rehearsal.recipe(config, problem, layout.mesh)
    weights = measure.random_params(WanTransformer, fewer, jnp.float32)
    inputs = (
        training.initial_state(config.transfer, recipe.student, weights),
        training.frozen(weights, recipe.dtype),
        rehearsal.batch(config, recipe, problem, np.random.default_rng(0)),
        knobs_at(config.transfer, config.transfer.warmup_steps, 1e-5, 1.0, True),
        jax.random.key(0),
    )

    # Not donated: every call has the same state.
    update = jax.jit(training.update.__wrapped__, static_argnames="recipe")

    def program(layout):
        return update.lower(replace(recipe, layout=layout), *inputs).compile()

    return _both("update", program, layout, inputs)


def _both(what: str, program, layout: MeshLayout, inputs) -> dict[str, Callable[[], Any]]:
    programs = {"plain": program(None), "mesh of one": program(layout)}
    return {
        f"{what}, {name}": partial(measure.ready, run, *inputs) for name, run in programs.items()
    }
