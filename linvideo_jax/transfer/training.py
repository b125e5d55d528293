"""The training of a student: its state, its loss, and the updates of warm-up and transfer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from linvideo_jax import optimizers
from linvideo_jax.errors import UserError
from linvideo_jax.models import wan
from linvideo_jax.models.module import Params, bind
from linvideo_jax.models.wan_config import FEATURE_MAPS
from linvideo_jax.transfer import objectives, samples, scores, selection
from linvideo_jax.transfer.recipe import Knobs, Recipe
from linvideo_jax.transfer.samples import Batch

State = dict[str, Any]

MAPS_OPTIMIZER = optax.adam(1.0, b2=0.99)  # of the feature maps, in the warm-up and after it
SCORE_OPTIMIZER = optax.adam(1.0, b1=0.0, b2=0.999)  # as distillation codes train their critics


def student_config(teacher: wan.WanConfig, feature_map: str = "hedgehog") -> wan.WanConfig:
    """The teacher's sizes with feature maps in every layer; UserError for an unknown one."""
    if feature_map not in FEATURE_MAPS:
        raise UserError(
            f"transfer.feature_map is {feature_map!r}: choose one of {', '.join(FEATURE_MAPS)}."
        )
    return replace(teacher, feature_map=feature_map)


def _is_map(path: tuple) -> bool:
    return "feature_map" in jax.tree_util.keystr(path)


def weights_optimizer(settings) -> optax.GradientTransformation:
    """The optimiser that `config.transfer` (or a Recipe) names, of rate 1; Adam for the maps."""

    def group(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "maps" if _is_map(path) else "weights", params
        )

    own = {"weights": optimizers.named(settings.optimizer), "maps": MAPS_OPTIMIZER}
    parts = [optax.clip_by_global_norm(settings.clip_norm), optax.multi_transform(own, group)]
    if settings.weight_decay:
        parts.append(optimizers.decay_of_matrices(settings.weight_decay))
    return optax.chain(*parts)


def initial_state(settings, config: wan.WanConfig, teacher_params: Params) -> State:
    """Student = teacher + initial feature maps, every layer mixed with score r_init.

    "ema", with `settings.ema_decay`: the moving average of the parameters. All is float32 but the
    modes; the products are in the dtype of the recipe. Every leaf is a buffer of its own, for
    `update` gives them back.
    """
    maps, layers = wan.initial_feature_map(config), config.num_layers
    return begun(settings, teacher_params, maps) | {
        "warmup": MAPS_OPTIMIZER.init(maps),
        "r": jnp.full((layers,), settings.r_init, jnp.float32),
        "mode": jnp.full((layers,), wan.MIX, jnp.int32),
        "settled": jnp.zeros((layers,), jnp.int32),
    }


def begun(settings, teacher_params: Params, maps: Params) -> State:
    """The weights of a state before their first update: the teacher's, with these feature maps.

    "params", their moments "optimizer", and "ema" if `settings` has one kept, all float32.
    """
    params = jax.tree.map(jnp.array, teacher_params)
    params["blocks"]["attn1"]["feature_map"] = jax.tree.map(jnp.array, maps)
    average = {"ema": jax.tree.map(jnp.array, params)} if settings.ema_decay else {}
    return average | {"params": params, "optimizer": weights_optimizer(settings).init(params)}


def frozen(params: Params, dtype: Any) -> Params:
    """Parameters that are not trained: the kernels of the layers in `dtype`, in which they act."""

    def cast(path, leaf):
        names = [key.key for key in path]
        return leaf.astype(dtype) if names[0] == "blocks" and names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def objectives_state(
    recipe: Recipe,
    score_params: Params,
    latent_shape: Sequence[int],
    text_shape: Sequence[int],
) -> State:
    """What the objective keeps beside the student: a score network, or the student's points.

    The score network begins as a copy: `update` gives a state's buffers back. latent_shape,
    text_shape: of a sample, without the axis batch.
    """
    if recipe.has_score_network:
        params = jax.tree.map(jnp.array, score_params)
        return {"score": {"params": params, "optimizer": SCORE_OPTIMIZER.init(params)}}
    if recipe.objective == "own_points":
        return {"own": samples.no_points(recipe, latent_shape, text_shape)}
    return {}


def network(
    recipe: Recipe, config: wan.WanConfig, params: Params, r=None, mode=None, remat="none"
) -> Callable[..., Array]:
    """(x, t, text, text_lengths) -> velocity."""
    model = bind(wan.WanTransformer, config, params)

    def velocity(x, t, text, text_lengths):
        time = samples.network_time(t, recipe.sampler)
        options = {"r": r, "mode": mode, "dtype": recipe.dtype, "remat": remat}
        return model(x, time, text, text_lengths, **options, layout=recipe.layout)

    return velocity


def _on(velocity: Callable[..., Array], batch: Batch) -> objectives.Velocity:
    """The velocity of the branch that each sample is of."""
    return lambda x, t: velocity(x, t, batch.text, batch.text_lengths)


def loss(trained, recipe: Recipe, state: State, teacher_params, batch: Batch, noised, knobs: Knobs):
    """(loss, parts) of `trained`, which holds "params" and "r": eq. 14 with the anchor.

    L = objective + beta anchor + lambda (L_con + L_reg); beta is of the distribution-matching
    objectives alone. noised: (noise, t) for dmd.
    """
    params, r = trained["params"], trained["r"]
    frozen = jax.lax.stop_gradient((params, r))
    student = network(recipe, recipe.student, params, r, state["mode"], recipe.remat)
    teacher = network(recipe, recipe.teacher, teacher_params)
    if recipe.has_score_network:
        score = network(recipe, recipe.teacher, state["score"]["params"])
    else:
        score = network(recipe, recipe.student, *frozen, state["mode"])
    student, teacher, score = (_on(u, batch) for u in (student, teacher, score))

    match recipe.objective:
        case "adm" | "adm_score":
            matching, u_student = objectives.anytime_distribution_matching(
                student, score, teacher, batch.x, batch.t_from, batch.t_to, recipe.weighting
            )
        case "dmd":
            x_0, u_student = objectives.rollout(
                student, batch.x, batch.t_from, recipe.rollout_steps
            )
            matching = objectives.distribution_matching_at_zero(
                x_0, *noised, score, teacher, recipe.weighting
            )
        case "mse" | "own_points":
            matching, u_student = None, student(batch.x, batch.t_from)

    objective, parts = matching, {recipe.objective: matching}
    if recipe.velocity != "unused":
        stored = recipe.velocity == "stored"
        u_teacher = batch.u_teacher if stored else teacher(batch.x, batch.t_from)
        velocity = objectives.velocity_matching(u_student, u_teacher)
        if matching is None:
            objective, parts = velocity, {recipe.objective: velocity}
        else:
            objective, parts = matching + knobs.beta * velocity, parts | {"anchor": velocity}
    con = scores.constraint(r, knobs.target)
    reg = scores.regulariser(r, knobs.alpha)
    total = objective + knobs.lambda_ * (con + reg)
    parts |= {"constraint": con, "regulariser": reg}
    return total, {"loss": total, "alpha": knobs.alpha} | parts


def score_network_updates(recipe: Recipe, state: State, others: Batch, knobs: Knobs, key):
    """`score_updates` updates of the score network on samples of the present student.

    A sample is reached from a stored state, of `others`, in `rollout_steps` Euler steps.
    """
    student = network(recipe, recipe.student, state["params"], state["r"], state["mode"])

    def one(score, drawn):
        batch, key = drawn
        x_0, _ = objectives.rollout(
            _on(student, batch), batch.x, batch.t_from, recipe.rollout_steps
        )
        noised = samples.noise_and_times(recipe.sigmas, batch.x, key)

        def gradient(part):
            batch, x_0, noised = part

            def error(params):
                velocity = network(recipe, recipe.teacher, params, remat=recipe.remat)
                return objectives.flow_matching(_on(velocity, batch), x_0, *noised)

            return jax.value_and_grad(error)(score["params"])

        parts = (batch, x_0, noised), recipe.accumulate
        value, grads = optimizers.mean_over_parts(gradient, *parts)
        changes, moments = SCORE_OPTIMIZER.update(grads, score["optimizer"])
        params = optimizers.apply(score["params"], changes, knobs.score_learning_rate)
        return {"params": params, "optimizer": moments}, value

    batches = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), others)
    keys = jax.random.split(key, recipe.score_updates)
    score, values = jax.lax.scan(one, state["score"], (batches, keys))
    return score, jnp.mean(values)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update(recipe: Recipe, state: State, teacher_params: Params, batch: Batch, knobs: Knobs, key):
    """One update of the student on a drawn batch: (state, metrics).

    The buffers of the state that is given are gone after it (donated): use the new one alone. One
    compilation serves every `knobs`.
    """
    batch, keys = samples.wide(batch), jax.random.split(key)
    noised, more = None, {}
    if recipe.has_score_network:
        noised = samples.noise_and_times(recipe.sigmas, batch.x, keys[0])
        score, more["score_loss"] = score_network_updates(
            recipe, state, batch.others, knobs, keys[1]
        )
        state = state | {"score": score}
    if recipe.objective == "own_points":
        student = network(recipe, recipe.student, state["params"], state["r"], state["mode"])
        teacher = network(recipe, recipe.teacher, teacher_params)
        before, fresh = samples.with_points(recipe, (state["own"], batch.fresh))
        points = samples.move(before, fresh, recipe, student, knobs)
        batch = batch._replace(fresh=None)
        batch = samples.own_points(batch, points, fresh, recipe, teacher, knobs, keys[1])
        state = state | {"own": samples.replaced(recipe, state["own"], points)}
    batch = batch._replace(others=None)
    grads, metrics = gradients(recipe, state, teacher_params, batch, noised, knobs)
    state, moved = stepped(recipe, state, grads, knobs)
    metrics = kept(recipe, metrics | moved | more)
    return kept(recipe, state), metrics | {"forwards": recipe.forwards}


def kept(recipe: Recipe, tree: State) -> State:
    """A state, gradients or metrics, laid out on the mesh as they are kept from step to step."""
    return tree if recipe.layout is None else recipe.layout.keep(tree)


def gradients(
    recipe: Recipe, state: State, teacher_params: Params, batch: Batch, noised, knobs: Knobs
) -> tuple[State, dict[str, Array]]:
    """(gradients of "params" and "r", parts of the loss), the batch in `accumulate` parts."""
    trained = {"params": state["params"], "r": state["r"]}

    def of_part(part):
        arguments = (recipe, state, teacher_params, *part, knobs)
        grads, parts = jax.grad(loss, has_aux=True)(trained, *arguments)
        return kept(recipe, grads), parts

    return optimizers.mean_over_parts(of_part, (batch, noised), recipe.accumulate)


def descended(state: State, gradient: Array, rate: jax.Array | float) -> Array:
    """r after a step of plain descent in [0, 1]; it moves in mixed layers alone.

    Adam would move all scores alike, whatever the objective.
    """
    r = jnp.clip(state["r"] - rate * gradient, 0.0, 1.0)
    return jnp.where(state["mode"] == wan.MIX, r, state["r"])


def stepped(recipe: Recipe, state: State, grads, knobs: Knobs) -> tuple[State, dict[str, Array]]:
    """(state, metrics) after the step that the gradient of "params" and "r" asks for."""
    optimizer = weights_optimizer(recipe)
    changes, moments = optimizer.update(grads["params"], state["optimizer"], state["params"])
    changes = jax.tree_util.tree_map_with_path(
        lambda path, change: knobs.feature_map_rate * change if _is_map(path) else change, changes
    )
    r = descended(state, grads["r"], knobs.r_learning_rate)
    r, mode, settled = selection.freeze(
        r, state["mode"], state["settled"], knobs.target, knobs.freeze_steps
    )
    params = optimizers.apply(state["params"], changes, knobs.learning_rate)
    new = state | {
        "params": params,
        "optimizer": moments,
        "r": r,
        "mode": mode,
        "settled": settled,
    }
    if "ema" in state:
        average = optimizers.moving_average(state["ema"], params, knobs.ema_decay, knobs.ema_age)
        new["ema"] = average
    return new, {
        "r": r,
        "mixed_layers": jnp.sum(mode == wan.MIX),
        "gradient_norm": optax.tree.norm(grads["params"]),
    }


def warmup_schedule(settings) -> optax.Schedule:
    """The rate of `warmup` at each of its steps."""
    return optimizers.warmup_cosine(settings.warmup_learning_rate, settings.warmup_steps, 1, 0.1)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def warmup(recipe: Recipe, state: State, batch: Batch, knobs: Knobs):
    """Like `update`, for the fit of every layer's feature maps to its softmax attention."""
    batch = samples.wide(batch)

    def with_maps(maps):
        attn1 = state["params"]["blocks"]["attn1"] | {"feature_map": maps}
        return state["params"] | {"blocks": state["params"]["blocks"] | {"attn1": attn1}}

    def error(maps):
        model = bind(wan.WanTransformer, recipe.student, with_maps(maps))
        time = samples.network_time(batch.t_from, recipe.sampler)
        inputs = batch.x, time, batch.text, batch.text_lengths
        errors = model.attention_errors(*inputs, dtype=recipe.dtype, layout=recipe.layout)
        return jnp.sum(errors), errors

    maps = state["params"]["blocks"]["attn1"]["feature_map"]
    (total, errors), grads = jax.value_and_grad(error, has_aux=True)(maps)
    changes, moments = MAPS_OPTIMIZER.update(grads, state["warmup"])
    params = with_maps(optimizers.apply(maps, changes, knobs.learning_rate))
    new = kept(recipe, state | {"params": params, "warmup": moments})
    return new, kept(recipe, {"loss": total, "attention_errors": errors, "r": state["r"]})
