"""The training of a student: its state, its samples, and the updates of warm-up and transfer."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int

from linvideo_jax import optimizers
from linvideo_jax.models import wan
from linvideo_jax.models.module import bind
from linvideo_jax.transfer import objectives, scores

State = dict[str, Any]


def student_config(teacher: wan.WanConfig) -> wan.WanConfig:
    """The teacher's sizes with feature maps in every layer."""
    return replace(teacher, feature_map="hedgehog")


def weights_optimizer(settings) -> optax.GradientTransformation:
    """Muon (matrices) and Adam, at a rate `feature_map_rate` times as high for the feature maps."""

    def group(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "maps" if "feature_map" in jax.tree_util.keystr(path) else "weights",
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.multi_transform(
            {
                "weights": optimizers.muon_with_adam(),
                "maps": optax.adam(settings.feature_map_rate, b2=0.99),
            },
            group,
        ),
    )


def initial_state(settings, config: wan.WanConfig, teacher_params) -> State:
    """Student = teacher + initial feature maps, every layer mixed with score r_init."""
    params = jax.tree.map(jnp.asarray, teacher_params)
    maps = jax.tree.map(jnp.asarray, wan.initial_feature_map(config))
    params["blocks"]["attn1"]["feature_map"] = maps
    layers = config.num_layers
    return {
        "params": params,
        "optimizer": weights_optimizer(settings).init(params),
        "warmup": optax.adam(1.0).init(maps),
        "r": jnp.full((layers,), settings.r_init, jnp.float32),
        "mode": jnp.full((layers,), wan.MIX, jnp.int32),
    }


def rounded(state: State, target: int) -> State:
    """The state with every score at 0 or 1 and every layer's mode softmax or linear.

    The `target` smallest scores become linear; where rounding alone would have chosen others, the
    corrections are in the log, and the unrounded scores in the metrics.
    """
    chosen, corrections = scores.choose_linear_layers(np.asarray(state["r"]), target)
    if corrections:
        logging.warning("rounding alone would have placed layers %s otherwise", corrections)
    linear = np.isin(np.arange(len(state["r"])), chosen)
    return state | {
        "r": jnp.asarray(np.where(linear, 0.0, 1.0), jnp.float32),
        "mode": jnp.asarray(np.where(linear, wan.LINEAR, wan.SOFTMAX), jnp.int32),
    }


class Batch(NamedTuple):
    """Samples of the stored pairs, each drawn for the conditional or the negative branch."""

    x: Float[Array, "batch frames height width channels"]
    u_teacher: Float[Array, "batch frames height width channels"]
    t_from: Float[Array, " batch"]
    t_to: Float[Array, " batch"]  # the next lower step of the grid
    text: Float[Array, "batch tokens text_dim"]
    text_lengths: Int[Array, " batch"]


def draw(data: dict[str, jax.Array], settings, key: jax.Array) -> Batch:
    """`settings.batch_size` pairs; a share `negative_fraction` of them on the negative branch."""
    pick, branch = jax.random.split(key)
    rows = jax.random.randint(pick, (settings.batch_size,), 0, data["step"].shape[0])
    negative = jax.random.bernoulli(branch, settings.negative_fraction, rows.shape)
    index, prompt = data["step"][rows], data["prompt"][rows]
    x, u_cond, u_neg = (data[name][rows].astype(jnp.float32) for name in ("x", "u_cond", "u_neg"))
    return Batch(
        x,
        jnp.where(negative[:, None, None, None, None], u_neg, u_cond),
        data["sigmas"][index],
        data["sigmas"][index + 1],
        jnp.where(negative[:, None, None], data["negative_text"], data["text"][prompt]),
        jnp.where(negative, data["negative_length"], data["text_lengths"][prompt]),
    )


def network_time(t: Float[Array, " batch"], sampler: str) -> Float[Array, " batch"]:
    """What the network is told at t, as `grids.network_timesteps` tells it when sampling."""
    return 1000.0 * t if sampler == "euler" else jnp.floor(1000.0 * t)


def make_loss(settings, config: wan.WanConfig, teacher_config: wan.WanConfig, sampler: str, dtype):
    """(trained, mode, teacher_params, batch, alpha) -> (loss, parts): eq. 14 with the anchor.

    `trained` holds "params" and "r"; loss = ADM + beta anchor + lambda (L_con + L_reg).
    """

    def loss(trained, mode, teacher_params, batch: Batch, alpha):
        def velocity(model_config, params, r, mode, remat):
            model = bind(wan.WanTransformer, model_config, params)
            text = (batch.text, batch.text_lengths)
            return lambda x, t: model(
                x, network_time(t, sampler), *text, r=r, mode=mode, dtype=dtype, remat=remat
            )

        params, r = trained["params"], trained["r"]
        frozen_params, frozen_r = jax.lax.stop_gradient((params, r))
        adm, u_student = objectives.anytime_distribution_matching(
            velocity(config, params, r, mode, settings.remat),
            velocity(config, frozen_params, frozen_r, mode, False),
            velocity(teacher_config, teacher_params, None, None, False),
            batch.x,
            batch.t_from,
            batch.t_to,
            settings.weighting,
        )
        anchor = objectives.velocity_anchor(u_student, batch.u_teacher)
        con = scores.constraint(r, settings.target)
        reg = scores.regulariser(r, alpha)
        total = adm + settings.beta * anchor + settings.lambda_ * (con + reg)
        parts = {"adm": adm, "anchor": anchor, "constraint": con, "regulariser": reg}
        return total, {"loss": total, "alpha": alpha} | parts

    return loss


def make_update(settings, config, teacher_config, sampler: str, dtype):
    """A jitted (state, teacher_params, data, step, learning_rate, key) -> (state, metrics)."""
    optimizer = weights_optimizer(settings)
    loss = make_loss(settings, config, teacher_config, sampler, dtype)

    @jax.jit
    def update(state, teacher_params, data, step, learning_rate, key):
        selecting = settings.round_at - settings.warmup_steps
        progress = (step - settings.warmup_steps) / max(selecting, 1)
        trained = {"params": state["params"], "r": state["r"]}
        grads, metrics = jax.grad(loss, has_aux=True)(
            trained,
            state["mode"],
            teacher_params,
            draw(data, settings, key),
            scores.annealed_alpha(progress, *settings.alpha),
        )
        changes, moments = optimizer.update(grads["params"], state["optimizer"], state["params"])
        # Plain gradient descent on r: Adam would move all scores alike, whatever the objective.
        r_rate = jnp.where(step < settings.round_at, settings.r_learning_rate, 0.0)
        r = jnp.clip(state["r"] - r_rate * grads["r"], 0.0, 1.0)
        new = state | {
            "params": optimizers.apply(state["params"], changes, learning_rate),
            "optimizer": moments,
            "r": r,
        }
        return new, metrics | {"r": r, "gradient_norm": optax.tree.norm(grads["params"])}

    return update


def make_warmup(settings, config: wan.WanConfig, sampler: str, dtype):
    """Like `make_update`, for the fit of every layer's feature maps to its softmax attention."""
    optimizer = optax.adam(1.0, b2=0.99)

    @jax.jit
    def warmup(state, data, learning_rate, key):
        batch = draw(data, settings, key)

        def loss(maps):
            params = state["params"]
            attn1 = params["blocks"]["attn1"] | {"feature_map": maps}
            params = params | {"blocks": params["blocks"] | {"attn1": attn1}}
            errors = bind(wan.WanTransformer, config, params).attention_errors(
                batch.x,
                network_time(batch.t_from, sampler),
                batch.text,
                batch.text_lengths,
                dtype=dtype,
            )
            return jnp.sum(errors), errors

        maps = state["params"]["blocks"]["attn1"]["feature_map"]
        (total, errors), grads = jax.value_and_grad(loss, has_aux=True)(maps)
        changes, moments = optimizer.update(grads, state["warmup"])
        attn1 = state["params"]["blocks"]["attn1"]
        attn1 = attn1 | {"feature_map": optimizers.apply(maps, changes, learning_rate)}
        params = state["params"] | {"blocks": state["params"]["blocks"] | {"attn1": attn1}}
        new = state | {"params": params, "warmup": moments}
        return new, {"loss": total, "attention_errors": errors, "r": state["r"]}

    return warmup
