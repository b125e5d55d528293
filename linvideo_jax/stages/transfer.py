"""Stage transfer: the teacher becomes a student whose layers are linear where their scores say so.

Three parts of one run: the feature maps are fitted layer by layer (`warmup_steps`), then all
weights and scores are trained together in mixed layers, and from `round_at` on the scores are
rounded and the rest of the run trains the rounded model.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from linvideo_jax import checkpoints, loop, optimizers
from linvideo_jax.errors import UserError
from linvideo_jax.models import wan
from linvideo_jax.stages import collect
from linvideo_jax.transfer import training


def on_device(collection: collect.Collection) -> dict[str, jax.Array]:
    """The whole collection as device arrays, for `draw`."""
    return jax.device_put(
        {
            **collection.pairs._asdict(),
            "sigmas": collection.sigmas.astype(np.float32),
            "text": collection.text,
            "text_lengths": collection.text_lengths,
            "negative_text": collection.negative_text,
            "negative_length": collection.negative_length,
        }
    )


def run(config, workdir: Path) -> None:
    """Trains and writes the student to `workdir/final`."""
    settings, workdir = config.transfer, Path(workdir)
    teacher = checkpoints.load(config.checkpoint)
    if not 0 <= settings.target <= teacher.wan_config.num_layers:
        raise UserError(
            f"transfer.target is {settings.target}: choose 0 to {teacher.wan_config.num_layers}."
        )
    if not settings.warmup_steps <= settings.round_at < settings.num_steps:
        raise UserError(
            f"transfer.round_at is {settings.round_at}: choose a step from warmup_steps, "
            f"{settings.warmup_steps}, to below num_steps, {settings.num_steps}."
        )
    collection = collect.read(workdir)
    wan_config = training.student_config(teacher.wan_config)
    data = on_device(collection)
    dtype, sampler = jnp.dtype(config.dtype), collection.sampler
    update = training.make_update(settings, wan_config, teacher.wan_config, sampler, dtype)
    warmup = training.make_warmup(settings, wan_config, sampler, dtype)
    schedule = optimizers.warmup_cosine(
        settings.learning_rate,
        settings.num_steps - settings.warmup_steps,
        settings.lr_warmup_steps,
        settings.final_learning_rate,
    )
    maps_schedule = optimizers.warmup_cosine(
        settings.warmup_learning_rate, settings.warmup_steps, 1, 0.1
    )
    seed = jax.random.key(config.seed)

    def step_of_run(state, step):
        key = jax.random.fold_in(seed, step)
        if step < settings.warmup_steps:
            return warmup(state, data, maps_schedule(step), key)
        if step == settings.round_at:
            state = training.rounded(state, settings.target)
        rate = schedule(step - settings.warmup_steps + 1)
        return update(state, teacher.transformer, data, step, rate, key)

    state = loop.run(
        "transfer",
        step_of_run,
        training.initial_state(settings, wan_config, teacher.transformer),
        num_steps=settings.num_steps,
        folder=workdir / "state" / "transfer",
        save_every=settings.save_every,
        log_every=settings.log_every,
    )
    linear = np.flatnonzero(np.asarray(state["mode"]) == wan.LINEAR).tolist()
    checkpoints.save(
        workdir / "final",
        config=checkpoints.make_config(
            wan_config,
            teacher.vae_config,
            teacher.umt5_config,
            linear_layers=linear,
            sampling=teacher.sampling,
        ),
        transformer=jax.device_get(state["params"]),
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer_folder,
        scheduler=teacher.scheduler,
        source=str(config.checkpoint),
    )
