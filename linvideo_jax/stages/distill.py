"""Stage distill: a linearised (or dense) model becomes one of a few steps without guidance (DMD2).

Two networks are trained in turn, the fake score at every step and the generator at each
`generator_every`-th, from prompts alone. The layers' kinds are those of the checkpoint and stay.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from linvideo_jax import checkpoints, loop, optimizers, report, turns
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.errors import UserError, check_accumulate, check_counts
from linvideo_jax.flow import solvers
from linvideo_jax.models import wan
from linvideo_jax.models.module import Params
from linvideo_jax.parallel import hosts
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.pipeline import Pipeline, Settings, check_settings, overridden
from linvideo_jax.stages import monitoring, transfer
from linvideo_jax.text import text_bucket
from linvideo_jax.transfer import distill_training, distillation, scores, selection, training
from linvideo_jax.transfer.distill_training import Knobs, Recipe, Texts


def run(config, workdir: Path) -> None:
    """Trains and writes the generator's moving average to `workdir/final`."""
    settings, workdir = config.distill, Path(workdir)
    check(config)
    teacher = load_teacher(config.teacher)
    student = checkpoints.load(config.checkpoint, ("transformer",), create=np.asarray)
    check_student(student, teacher, settings)
    placement = Placement.of(config, heads_of(student, teacher))
    beside = transfer.Beside.of(config.checkpoint)
    sampling = few_step_sampling(teacher.sampling, settings)
    pipeline = Pipeline(turns.open_folder(config.teacher), config.dtype)
    shape = pipeline.latent_shape(sampling)
    prompts = Prompts(config.prompts, pipeline, sampling.negative_prompt, settings.batch_size)
    del pipeline  # and with it the text encoder
    rows = placement.rows(settings.batch_size, settings.accumulate)
    wan_config, params, r, mode = first_state(student, config)
    sizes = wan_config, teacher.wan_config
    recipe = recipe_of(config, *sizes, teacher.sampling, shape, placement.layout)
    fake = transfer.score_network(settings.fake_score, teacher, "distill.fake_score")
    schedule = optimizers.warmup_cosine(
        1.0, settings.num_steps, settings.lr_warmup_steps, settings.final_learning_rate
    )
    guidance_scale = distillation.standard_guidance(
        settings.guidance_scale, settings.guidance_convention
    )
    seed = jax.random.key(config.seed)

    def step_of_run(state, step):
        if settings.one_stage and step == settings.round_at:
            state = placement.params(transfer.chosen(state, None, config.transfer, workdir))
        knobs = knobs_at(config, step, guidance_scale, schedule(step + 1))
        critic, actor = jax.random.split(jax.random.fold_in(seed, step))
        metrics, starting = {}, step < settings.start_steps
        if starting or step % settings.generator_every == settings.generator_every - 1:
            texts = placement.batch(
                prompts.draw(config.seed, 2 * step + 1, rows), settings.batch_size
            )
            update = (
                distill_training.update_start if starting else distill_training.update_generator
            )
            state, metrics = update(recipe, state, teacher.transformer, texts, knobs, actor)
        texts = placement.batch(prompts.draw(config.seed, 2 * step, rows), settings.batch_size)
        state, more = distill_training.update_fake_score(recipe, state, texts, knobs, critic)
        return state, metrics | more

    make = partial(distill_training.initial_state, recipe)
    # In a list, to be let go of when the loop has it.
    begin = [placement.make(make, *(placement.params(tree) for tree in (params, fake, r, mode)))]
    del params, fake
    student = replace(student, transformer=None)
    # From here on the teacher's kernels are in the dtype in which they act.
    frozen = training.frozen(placement.params(teacher.transformer), recipe.dtype)
    teacher = replace(teacher, transformer=frozen)

    folder = workdir / "state" / "distill"
    events = [(settings.log_every, monitoring.report_every(settings.report_every, workdir))]
    if settings.sample_every:
        shown = (recipe.student, config, settings.sample_prompts)
        event = monitoring.Samples(folder, teacher, *shown, sampling=sampling, weights="ema")
        events.insert(0, (settings.sample_every, event))
    marks = [[settings.start_steps, "DMD2 begins"]] if settings.start_steps else []
    marks += [[settings.round_at, "rounded"]] if settings.one_stage else []
    facts = {"num_steps": settings.num_steps, "marks": marks}
    if hosts.is_first():
        loop.write_json(folder / monitoring.FACTS, facts)
    state = loop.run(
        "distill",
        step_of_run,
        begin.pop(),
        num_steps=settings.num_steps,
        folder=folder,
        save_every=settings.save_every,
        log_every=settings.log_every,
        keep=settings.keep,
        guard=loop.Guard("loss", settings.divergence_factor, settings.divergence_steps),
        events=events,
        profile_at=settings.profile_at,
    )
    weights = whole(state["ema"])
    if not hosts.is_first():
        return
    monitoring.warn_of_a_flat_first_step(folder)
    report.write(workdir)
    beside.save(
        workdir / "final",
        recipe.student,
        weights,
        state["mode"],
        sampling=asdict(sampling),  # with it, no flag is needed
        tokenizer=student.tokenizer_folder,
        scheduler=checkpoints.few_step_scheduler(sampling.flow_shift, sampling.num_inference_steps),
    )


def check(config) -> None:
    """UserError for what `config.distill` cannot mean, before anything is loaded."""
    settings = config.distill
    counts = ("batch_size", "accumulate", "generator_every", "log_every", "save_every")
    check_counts("distill", settings, (*counts, "start_sampling_steps"))
    check_accumulate("distill", settings)
    if settings.sampler not in solvers.FEW_STEP_SAMPLERS:
        raise UserError(
            f"distill.sampler is {settings.sampler!r}: choose one of "
            f"{', '.join(solvers.FEW_STEP_SAMPLERS)}."
        )
    check_settings(denoising_steps=settings.denoising_steps)
    distillation.standard_guidance(settings.guidance_scale, settings.guidance_convention)
    if settings.log_every % settings.generator_every:
        raise UserError(
            f"distill.log_every is {settings.log_every}: choose a multiple of generator_every, "
            f"{settings.generator_every}, so that lines have both losses."
        )
    if not 0 <= settings.start_steps < settings.num_steps or (
        settings.start_steps % settings.generator_every
    ):
        raise UserError(
            f"distill.start_steps is {settings.start_steps}: choose 0, or a multiple of "
            f"generator_every, {settings.generator_every}, below num_steps, {settings.num_steps}."
        )
    if not settings.one_stage:
        return
    if "transfer" not in config:
        raise UserError(
            "distill.one_stage chooses layers as the group transfer says, which this configuration "
            "lacks: add it, or leave one_stage out."
        )
    if not settings.start_steps < settings.round_at < settings.num_steps:
        raise UserError(
            f"distill.round_at is {settings.round_at}: choose a step above start_steps, "
            f"{settings.start_steps}, and below num_steps, {settings.num_steps}."
        )


def load_teacher(folder: str) -> checkpoints.Checkpoint:
    """The frozen teacher; UserError without one, or for one that has linear layers."""
    if not folder:
        raise UserError("teacher is empty: name the folder of the model to learn from.")
    teacher = checkpoints.load(folder, ("transformer",), create=np.asarray)
    if teacher.linear_layers:
        raise UserError(f"the teacher {folder} has linear layers: name the model it came from.")
    return teacher


def check_student(student, teacher, settings) -> None:
    """UserError if the checkpoint cannot be distilled from this teacher as `settings` ask."""
    ours, theirs = student.wan_config, teacher.wan_config
    for name in ("patch_size", "in_channels", "out_channels", "text_dim"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"{student.path} has {name} {getattr(ours, name)}, the teacher {teacher.path} "
                f"{getattr(theirs, name)}: choose two models of one family."
            )
    if settings.one_stage and student.linear_layers:
        raise UserError(
            f"{student.path} has linear layers already, and distill.one_stage chooses them: start "
            "from a model without, or leave one_stage out."
        )
    if settings.require_selection and not settings.one_stage and not student.linear_layers:
        raise UserError(
            f"{student.path} has no linear layers: give what the transfer stage made, or distil a "
            "dense model by --config.distill.require_selection=False."
        )


def heads_of(student: checkpoints.Checkpoint, teacher: checkpoints.Checkpoint) -> int:
    """A number that the mesh's axis context divides if it divides the heads of both."""
    return math.gcd(*(one.wan_config.num_attention_heads for one in (student, teacher)))


def recipe_of(
    config,
    student: wan.WanConfig,
    teacher: wan.WanConfig,
    sampling: Mapping[str, Any],
    shape: tuple[int, ...],
    layout: Any = None,
) -> Recipe:
    """What the updates are compiled for; sampling: the teacher's; shape: of a video's latents.

    UserError as `few_step_sampling` and `start_sampling`.
    """
    settings = config.distill
    start = start_sampling(sampling, settings)
    return Recipe.of(
        settings,
        student=student,
        teacher=teacher,
        fake=teacher,
        sigmas=few_step_sampling(sampling, settings).sigmas(),
        start_sampler=start.sampler,
        start_sigmas=start.sigmas(),
        shape=shape,
        dtype=config.dtype,
        layout=layout,
    )


def few_step_sampling(teacher: Mapping[str, Any], settings) -> Settings:
    """How the generator is sampled, in training and after; UserError for a list that cannot be.

    teacher: how that one is sampled, by name.
    """
    steps = tuple(settings.denoising_steps)
    few = {
        "sampler": settings.sampler,
        "num_inference_steps": len(steps),
        "denoising_steps": steps,
        "guidance_scale": 1.0,
        "flow_shift": settings.flow_shift if settings.warp_steps else 1.0,
    }
    return Settings(**overridden(teacher, settings.sampling.to_dict() | few))


def start_sampling(teacher: Mapping[str, Any], settings) -> Settings:
    """How the teacher is sampled for the start: by its own sampler, in fewer steps.

    UserError for a distilled teacher, which re-noises.
    """
    steps = {"num_inference_steps": settings.start_sampling_steps}
    sampling = Settings(**overridden(teacher, settings.sampling.to_dict() | steps))
    if settings.start_steps and sampling.sampler == "renoise":
        raise UserError(
            "the teacher is sampled with renoise, so its samples are not of their first noise: set "
            "distill.start_steps to 0, or choose a teacher that is not distilled."
        )
    return sampling


class Prompts:
    """Embeddings of a file's prompts in the host's memory, from which batches are drawn."""

    def __init__(self, path: str, pipeline: Pipeline, negative: str, batch_size: int):
        self._prompts, self._negative = prompt_files.read(path), negative
        pipeline.encode([*self._prompts, negative])
        self._texts, self._batch_size = pipeline.texts, batch_size
        longest = max(len(self._texts[prompt]) for prompt in (*self._prompts, negative))
        self._tokens = text_bucket(longest)

    def draw(self, seed: int, number: int, rows: Int[np.ndarray, " rows"]) -> Texts:
        """The texts of these rows of batch `number`, which is the same on every host."""
        drawn = np.random.default_rng([seed, number]).integers(
            len(self._prompts), size=self._batch_size
        )
        return Texts(
            *self._padded([self._prompts[i] for i in drawn[rows]]),
            *self._padded([self._negative] * len(rows)),
        )

    def _padded(self, prompts):
        lengths = np.array([len(self._texts[prompt]) for prompt in prompts], np.int32)
        return self._texts.padded(prompts, self._tokens), lengths


def first_state(student: checkpoints.Checkpoint, config) -> tuple[wan.WanConfig, Params, Any, Any]:
    """(sizes, parameters, r, mode) that the generator begins with.

    In one stage it is the teacher with initial feature maps and every layer mixed, as the transfer
    stage begins; else the checkpoint, each layer of the kind that it has there.
    """
    layers, sizes = student.wan_config.num_layers, student.wan_config
    if config.distill.one_stage:
        selection.check(config.transfer, layers)
        sizes = training.student_config(sizes, config.transfer.feature_map)
        begin = training.initial_state(config.transfer, sizes, student.transformer)
        return sizes, begin["params"], begin["r"], begin["mode"]
    linear = np.isin(np.arange(layers), student.linear_layers)
    mode = np.where(linear, wan.LINEAR, wan.SOFTMAX)
    return sizes, student.transformer, np.where(linear, 0.0, 1.0), mode


def knobs_at(config, step: int, guidance_scale: float, rate) -> Knobs:
    """The knobs of a step; rate: the share of both learning rates."""
    settings = config.distill
    start = settings.start_steps
    learning_rate = settings.learning_rate if step >= start else settings.start_learning_rate
    knobs = Knobs(
        generator_rate=learning_rate * rate,
        fake_rate=settings.fake_learning_rate * rate,
        guidance_scale=guidance_scale,
        flow_shift=settings.flow_shift,
        normalise=settings.normalise,
        ema_decay=settings.ema_decay,
        ema_age=min(step, start) + max(step - start, 0) // settings.generator_every,
    )
    if not settings.one_stage or step >= settings.round_at:
        return knobs
    own = config.transfer
    return knobs._replace(
        r_learning_rate=own.r_learning_rate,
        lambda_=own.lambda_,
        alpha=scores.annealed_alpha(step / settings.round_at, *own.alpha),
        target=own.target,
    )
