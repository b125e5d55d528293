"""Stage transfer: the teacher becomes a student whose layers are linear where their scores say so.

Three parts of one run: the feature maps are fitted layer by layer (`warmup_steps`), then all
weights and scores are trained together in mixed layers, and from `round_at` on the scores are
rounded and the rest of the run trains the rounded model, from the teacher's weights with `rewind`.
Where layers are not chosen by scores (`selection`), the second part is left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Int

from linvideo_jax import checkpoints, loop, optimizers, report, turns
from linvideo_jax.data import loader, online, trajectories
from linvideo_jax.data.trajectories import Index
from linvideo_jax.errors import UserError, check_counts
from linvideo_jax.metrics import flops
from linvideo_jax.models import wan
from linvideo_jax.models.module import Params
from linvideo_jax.parallel import hosts
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.parts import Flat, flatten
from linvideo_jax.stages import collect, monitoring
from linvideo_jax.transfer import selection, training
from linvideo_jax.transfer.recipe import ONLY_VELOCITY, Recipe, knobs_at
from linvideo_jax.transfer.samples import Draw


def recipe_of(
    config, settings, index: Index, teacher: checkpoints.Checkpoint, layout: Any = None
) -> Recipe:
    """What an update on pairs with this index is compiled for; settings: `config.transfer`."""
    return Recipe.of(
        settings,
        training.student_config(teacher.wan_config, settings.feature_map),
        teacher.wan_config,
        index.sampler,
        config.dtype,
        sigmas=index.sigmas,
        store_velocity=index.made["store_velocity"],
        layout=layout,
    )


def samples_of(
    pairs: trajectories.Pairs | online.Pairs, recipe: Recipe, settings, seed: int
) -> grain.MapDataset:
    """The samples of a run, by their number."""
    draw = Draw(pairs, recipe, settings.negative_fraction, settings.own_steps)
    return loader.samples(pairs, draw, seed, recipe.batch_size)


def check(config) -> None:
    """UserError for values of `config.transfer` that cannot be, before pairs are collected."""
    settings, teacher = config.transfer, turns.open_folder(config.checkpoint).wan_config
    check_settings(settings, teacher.num_layers)
    student = training.student_config(teacher, settings.feature_map)
    # The collection's sampler and grid come with it.
    options = {"sigmas": (1.0, 0.0), "store_velocity": config.collect.store_velocity}
    Recipe.of(settings, student, teacher, "unipc", config.dtype, **options)


def check_settings(settings, num_layers: int) -> None:
    """UserError for values of `config.transfer` that do not fit together or the model."""
    selection.check(settings, num_layers)
    check_counts("transfer", settings, ("log_every", "save_every"))
    alpha = tuple(settings.alpha)
    if len(alpha) not in (2, 3) or (len(alpha) == 3 and not alpha[2] > 0):
        raise UserError(
            f"transfer.alpha is {alpha}: give its start, its end, and the share of the time, above "
            "0, at which it gets there."
        )
    if not settings.warmup_steps <= settings.round_at < settings.num_steps:
        raise UserError(
            f"transfer.round_at is {settings.round_at}: choose a step from warmup_steps, "
            f"{settings.warmup_steps}, to below num_steps, {settings.num_steps}."
        )
    final_weights(settings)


def run(config, workdir: Path) -> None:
    """Trains and writes the student to `workdir/final`."""
    settings, workdir = config.transfer, Path(workdir)
    teacher = checkpoints.load(config.checkpoint, ("transformer",), create=np.asarray)
    placement = Placement.of(config, teacher.wan_config.num_attention_heads)
    beside = Beside.of(config.checkpoint)
    num_layers = teacher.wan_config.num_layers
    check_settings(settings, num_layers)
    final = final_weights(settings)
    teacher = replace(teacher, transformer=placement.params(teacher.transformer))
    pairs = collect.opened(config, workdir, teacher, settings.batch_size, placement)
    index = pairs.index
    recipe = recipe_of(config, settings, index, teacher, placement.layout)
    rows = placement.rows(settings.batch_size, settings.accumulate)
    score_params = None
    if recipe.has_score_network:
        score_params = placement.params(score_network(settings.score_network, teacher))
    layers = selection.before_training(settings, num_layers, read_profile(settings, workdir))
    dataset = samples_of(pairs, recipe, settings, config.seed)
    choose_at = settings.round_at if layers is None else settings.warmup_steps
    schedule = optimizers.warmup_cosine(
        settings.learning_rate,
        settings.num_steps - settings.warmup_steps,
        settings.lr_warmup_steps,
        settings.final_learning_rate,
    )
    maps_schedule = training.warmup_schedule(settings)
    seed = jax.random.key(config.seed)

    def step_of_run(state, step, batch):
        warming, selecting = step < settings.warmup_steps, step < choose_at
        rate = maps_schedule(step) if warming else schedule(step - settings.warmup_steps + 1)
        knobs = knobs_at(settings, step, rate, index.made["guidance_scale"], selecting)
        batch = placement.batch(batch, settings.batch_size)
        if warming:
            return training.warmup(recipe, state, batch, knobs)
        if step == choose_at:
            state = placement.params(chosen(state, layers, settings, workdir))
            if settings.rewind and layers is None:
                state = rewound(state, config, placement)
        key = jax.random.fold_in(seed, step)
        return training.update(recipe, state, teacher.transformer, batch, knobs, key)

    def initial(teacher, score):
        shapes = index.latent_shape, index.text_shape
        state = training.initial_state(settings, recipe.student, teacher)
        return state | training.objectives_state(recipe, score, *shapes)

    # In a list, to be let go of when the loop has it.
    begin = [placement.make(initial, teacher.transformer, score_params)]
    del score_params
    # From here on the teacher's kernels are in the dtype in which they act.
    teacher = replace(teacher, transformer=training.frozen(teacher.transformer, recipe.dtype))

    folder = workdir / "state" / "transfer"
    events = [(settings.log_every, monitoring.report_every(settings.report_every, workdir))]
    if settings.freeze_steps:
        events.append((settings.log_every, monitoring.frozen_layers(choose_at)))
    if settings.sample_every:
        samples = monitoring.Samples(
            folder, teacher, recipe.student, config, settings.sample_prompts
        )
        events.insert(0, (settings.sample_every, samples))
    tokens = flops.video_tokens(recipe.student, index.latent_shape)
    if hosts.is_first():
        monitoring.write_facts(folder, settings, recipe.student, tokens, index.text_shape[0])
    state = loop.run(
        "transfer",
        step_of_run,
        begin.pop(),
        num_steps=settings.num_steps,
        folder=folder,
        save_every=settings.save_every,
        log_every=settings.log_every,
        data=loader.batches(dataset, settings.batch_size, num_threads=pairs.num_threads, rows=rows),
        keep=settings.keep,
        best=settings.best,
        guard=loop.Guard(
            settings.objective if settings.objective in ONLY_VELOCITY else "anchor",
            settings.divergence_factor,
            settings.divergence_steps,
            fresh_at=(settings.warmup_steps, choose_at),
        ),
        events=events,
        profile_at=settings.profile_at,
    )
    weights = whole(state[final])
    if not hosts.is_first():
        return
    report.write(workdir)
    beside.save(
        workdir / "final",
        recipe.student,
        weights,
        state["mode"],
        sampling=teacher.sampling,
        tokenizer=teacher.tokenizer_folder,
        scheduler=teacher.scheduler,
    )


def rewound(state: training.State, config, placement: Placement) -> training.State:
    """The state with the teacher's weights again, beside the feature maps that it has.

    The buffers of the weights, moments and average that it had are given back.
    """
    # Read again: the teacher beside the student has its kernels in the dtype in which they act.
    teacher = checkpoints.load(config.checkpoint, ("transformer",), create=np.asarray)
    teacher = placement.params(teacher.transformer)
    maps = state["params"]["blocks"]["attn1"]["feature_map"]
    again = placement.make(partial(training.begun, config.transfer), teacher, maps)
    for leaf in jax.tree.leaves([state[name] for name in again]):
        leaf.delete()
    return state | again


class Beside(NamedTuple):
    """The networks beside a checkpoint's transformer, which training copies: lazy, read at the end.

    sizes: of config.json; a folder of diffusers' gives those of what is asked for.
    """

    source: str
    sizes: dict[str, Any]
    flat: dict[str, Flat]

    @classmethod
    def of(cls, folder: str) -> "Beside":
        """Those of a model folder."""
        return cls(str(folder), *checkpoints.read_flat(folder, ("vae", "text_encoder"))[:2])

    def save(
        self,
        folder: Path,
        config: wan.WanConfig,
        weights: Params,
        mode: Int[Array, " layers"],
        *,
        sampling: Mapping[str, Any],
        tokenizer: Path | None,
        scheduler: dict[str, Any],
    ) -> None:
        """Writes a trained transformer with them; its linear layers are those of that mode."""
        models = checkpoints.model_configs(self.sizes)
        checkpoints.save_flat(
            folder,
            config=checkpoints.make_config(
                config,
                **{part: models[part] for part in self.flat},
                linear_layers=np.flatnonzero(np.asarray(mode) == wan.LINEAR).tolist(),
                sampling=sampling,
            ),
            flat={"transformer": flatten(weights), **self.flat},
            tokenizer=tokenizer,
            scheduler=scheduler,
            source=self.source,
        )


def final_weights(settings) -> str:
    """Where in the state the student's weights are; UserError for an average that is not kept."""
    known = {"raw": "params", "ema": "ema"}
    if settings.final_weights not in known:
        raise UserError(
            f"transfer.final_weights is {settings.final_weights!r}: choose one of raw, ema."
        )
    if settings.final_weights == "ema" and not settings.ema_decay:
        raise UserError("transfer.final_weights is 'ema': set transfer.ema_decay above 0, too.")
    return known[settings.final_weights]


def score_network(
    folder: str, teacher: checkpoints.Checkpoint, field: str = "transfer.score_network"
) -> Params:
    """What the score network starts from: the teacher, or the softmax model in `folder`.

    UserError, which names the `field`, if that has other sizes than the teacher, or linear layers.
    """
    if not folder:
        return teacher.transformer
    own = checkpoints.load(folder, ("transformer",))
    if own.wan_config.to_dict() != teacher.wan_config.to_dict():
        raise UserError(
            f"{field}, {folder}, has other sizes than the teacher {teacher.path}: "
            "choose a model of the same sizes, or none for the teacher itself."
        )
    if own.linear_layers:
        raise UserError(
            f"{field}, {folder}, has linear layers: choose a model without, or none for the "
            "teacher itself."
        )
    params = own.transformer
    if own.wan_config.feature_map is not None:
        attn1 = {k: v for k, v in params["blocks"]["attn1"].items() if k != "feature_map"}
        params = params | {"blocks": params["blocks"] | {"attn1": attn1}}
    return params


def read_profile(settings, workdir: Path) -> selection.Profile | None:
    """The profile stage's result, for selection "grid"; UserError if it is not there."""
    if settings.selection != "grid":
        return None
    path = workdir / "profile" / "profile.json"
    if not path.exists():
        raise UserError(f"{path} is missing: put the stage profile before transfer.")
    profile = loop.read_json(path)
    print(
        f"grid: the profile of {len(profile['rows'])} ranges cost {profile['updates']:,} updates, "
        f"{profile['seconds']:,.0f} s"
    )
    return profile


def chosen(state: training.State, layers, settings, workdir: Path) -> training.State:
    """The state with its layers placed, and `workdir/selection.json`, which says how."""
    entry = {"selection": settings.selection, "target": settings.target}
    if layers is None:
        layers, told = selection.by_scores(
            state["r"], state["mode"], settings.target, settings.rounding
        )
        if told["moved"]:
            logging.warning("rounding alone would have placed layers %s otherwise", told["moved"])
        entry |= told
    if hosts.is_first():
        loop.write_json(workdir / "selection.json", entry | {"layers": list(layers)})
    return selection.placed(state, layers)
