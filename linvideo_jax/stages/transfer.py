"""Stage transfer: the teacher becomes a student whose layers are linear where their scores say so.

Three parts of one run: the feature maps are fitted layer by layer (`warmup_steps`), then all
weights and scores are trained together in mixed layers, and from `round_at` on the scores are
rounded and the rest of the run trains the rounded model.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from linvideo_jax import checkpoints, loop, optimizers
from linvideo_jax.models import wan
from linvideo_jax.models.module import bind
from linvideo_jax.stages import collect
from linvideo_jax.transfer import objectives, scores

State = dict[str, Any]


def student_config(teacher: wan.WanConfig) -> wan.WanConfig:
    """The teacher's sizes with feature maps in every layer."""
    return wan.WanConfig.from_dict({**teacher.to_dict(), "feature_map": "hedgehog"})


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
    params["blocks"]["attn1"]["feature_map"] = wan.initial_feature_map(config)
    layers = config.num_layers
    return {
        "params": params,
        "optimizer": weights_optimizer(settings).init(params),
        "r": jnp.full((layers,), settings.r_init, jnp.float32),
        "mode": jnp.full((layers,), wan.MIX, jnp.int32),
    }


def rounded(state: State, target: int) -> State:
    """The state with every score at 0 or 1 and every layer's mode softmax or linear."""
    chosen, corrections = scores.choose_linear_layers(np.asarray(state["r"]), target)
    linear = np.isin(np.arange(len(state["r"])), chosen)
    del corrections  # reported from the metrics file, where the unrounded scores stand
    return state | {
        "r": jnp.asarray(np.where(linear, 0.0, 1.0), jnp.float32),
        "mode": jnp.asarray(np.where(linear, wan.LINEAR, wan.SOFTMAX), jnp.int32),
    }


def make_update(settings, config: wan.WanConfig, teacher_config: wan.WanConfig, sampler, dtype):
    """A jitted (state, teacher_params, data, step, key) -> (state, metrics) of eq. 14."""
    optimizer = weights_optimizer(settings)

    def network_time(t):
        return jnp.floor(1000.0 * t) if sampler == "unipc" else 1000.0 * t

    def loss(trained, state, teacher_params, data, progress, key):
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (settings.batch_size,), 0, data["step"].shape[0])
        index, prompt = data["step"][rows], data["prompt"][rows]
        negative = jax.random.bernoulli(keys[1], settings.negative_fraction, rows.shape)
        x, u_cond, u_neg = (data[name][rows].astype(jnp.float32) for name in ("x", "u_cond", "u_neg"))
        u_teacher = jnp.where(negative[:, None, None, None, None], u_neg, u_cond)
        text = jnp.where(negative[:, None, None], data["negative_text"], data["text"][prompt])
        lengths = jnp.where(negative, data["negative_length"], data["text_lengths"][prompt])
        t_from, t_to = data["sigmas"][index], data["sigmas"][index + 1]

        def velocity(model_config, params, r, mode, remat):
            model = bind(wan.WanTransformer, model_config, params)
            return lambda x, t: model(
                x, network_time(t), text, lengths, r=r, mode=mode, dtype=dtype, remat=remat
            )

        params, r = trained["params"], trained["r"]
        frozen = jax.lax.stop_gradient((params, r))
        adm, u_student = objectives.anytime_distribution_matching(
            velocity(config, params, r, state["mode"], settings.remat),
            velocity(config, *frozen, state["mode"], False),
            velocity(teacher_config, teacher_params, None, None, False),
            x,
            t_from,
            t_to,
            settings.weighting,
        )
        anchor = objectives.velocity_anchor(u_student, u_teacher)
        alpha = scores.annealed_alpha(progress, *settings.alpha)
        con = scores.constraint(r, settings.target)
        reg = scores.regulariser(r, alpha)
        total = adm + settings.beta * anchor + settings.lambda_ * (con + reg)
        return total, {
            "loss": total, "adm": adm, "anchor": anchor, "constraint": con, "regulariser": reg,
            "alpha": alpha,
        }  # fmt: skip

    @jax.jit
    def update(state, teacher_params, data, step, key):
        progress = (step - settings.warmup_steps) / max(settings.round_at - settings.warmup_steps, 1)
        trained = {"params": state["params"], "r": state["r"]}
        grads, metrics = jax.grad(loss, has_aux=True)(
            trained, state, teacher_params, data, progress, key
        )
        changes, optimizer_state = optimizer.update(
            grads["params"], state["optimizer"], state["params"]
        )
        # Plain gradient descent on r: Adam would move all scores alike, whatever the objective says.
        moving = jnp.where(step < settings.round_at, settings.r_learning_rate, 0.0)
        r = jnp.clip(state["r"] - moving * grads["r"], 0.0, 1.0)
        new = state | {
            "params": optax.apply_updates(state["params"], changes),
            "optimizer": optimizer_state,
            "r": r,
        }
        return new, metrics | {"r": r, "gradient_norm": optax.global_norm(grads["params"])}

    return update


def run(config, workdir: Path) -> None:
    """Trains and writes the student to `workdir/final`."""
    settings = config.transfer
    workdir = Path(workdir)
    teacher = checkpoints.load(config.checkpoint)
    collection = collect.read(workdir)
    dtype = jnp.dtype(config.dtype)
    sampler = loop.read_json(workdir / "pairs" / "grid.json")["sampler"]
    wan_config = student_config(teacher.wan_config)
    teacher_params = jax.tree.map(jnp.asarray, teacher.transformer)
    data = jax.device_put(
        {
            **collection.pairs._asdict(),
            "sigmas": collection.sigmas.astype(np.float32),
            "text": collection.text,
            "text_lengths": collection.text_lengths,
            "negative_text": collection.negative_text,
            "negative_length": collection.negative_length,
        }
    )
    update = make_update(settings, wan_config, teacher.wan_config, sampler, dtype)
    warm = make_warmup(settings, wan_config, sampler, dtype)
    seed = jax.random.key(config.seed)

    def step_of_run(state, step):
        if step == settings.round_at:
            state = rounded(state, settings.target)
        function = warm if step < settings.warmup_steps else update
        return function(state, teacher_params, data, step, jax.random.fold_in(seed, step))

    state = loop.run(
        "transfer",
        step_of_run,
        initial_state(settings, wan_config, teacher.transformer),
        num_steps=settings.num_steps,
        folder=workdir / "state" / "transfer",
        save_every=settings.save_every,
        log_every=settings.log_every,
    )
    linear = np.flatnonzero(np.asarray(state["mode"]) == wan.LINEAR).tolist()
    checkpoints.save(
        workdir / "final",
        config={**teacher.config, "linear_layers": linear, "feature_map": "hedgehog"},
        transformer=jax.device_get(state["params"]),
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer.folder,
        scheduler=teacher.scheduler,
    )
