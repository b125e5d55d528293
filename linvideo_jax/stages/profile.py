"""Stage profile: how well each range of layers can be replaced (the paper's replaceability figure).

Every range of `width` consecutive layers is made linear in the teacher, recovers for `num_steps`
updates of MSE on the stored pairs, and is measured. The feature maps start from one common fit.
Writes `workdir/profile/profile.json` and `profile.svg`; ranges that are done are kept.
"""

import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from linvideo_jax import checkpoints, evaluation, loop, optimizers, turns
from linvideo_jax.data import loader
from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.metrics import classifier
from linvideo_jax.progress import Progress
from linvideo_jax.report.profile import figure
from linvideo_jax.stages import collect, transfer
from linvideo_jax.stages.evaluate import chosen_prompts, sampling_settings
from linvideo_jax.transfer import samples, selection, training
from linvideo_jax.transfer.recipe import Recipe, knobs_at


def run(config, workdir: Path) -> None:
    """Measures every range that `workdir/profile/rows` does not hold yet."""
    own, settings = config.profile, config.transfer.copy_and_resolve_references()
    settings.objective = "mse"
    folder = Path(workdir) / "profile"
    teacher = checkpoints.load(config.checkpoint)
    num_layers = teacher.wan_config.num_layers
    if not 1 <= own.width <= num_layers:
        raise UserError(f"profile.width is {own.width}: choose 1 to {num_layers}.")
    ranges = [list(range(first, first + own.width)) for first in range(num_layers - own.width + 1)]
    mark = evaluation.fingerprint(
        turns.mark(teacher, "transformer"), own.to_dict(), settings.to_dict(), config.seed,
        config.dtype, evaluation.judged_by(config.evaluate) if own.num_prompts else None,
    )  # fmt: skip
    rows = {tuple(layers): finished(row_path(folder, layers), mark) for layers in ranges}
    missing = [layers for layers in ranges if rows[tuple(layers)] is None]
    if missing:
        measured = Bench(config, settings, teacher, Path(workdir))
        with Progress("profile", len(ranges), len(ranges) - len(missing)) as progress:
            for done, layers in enumerate(missing, len(ranges) - len(missing) + 1):
                row = {"layers": layers, **measured.row(layers)}
                loop.write_json(row_path(folder, layers), {"fingerprint": mark, **row})
                rows[tuple(layers)] = row
                progress.update(done, f"error {row['error_after']:.3g}")
    profile = {
        "num_layers": num_layers,
        "width": own.width,
        "updates": own.num_steps * len(ranges),
        "seconds": sum(row["seconds"] for row in rows.values()),
        "device": jax.devices()[0].device_kind,
        "rows": list(rows.values()),
    }
    loop.write_json(folder / "profile.json", profile)
    with replacing(folder / "profile.svg") as temporary:
        temporary.write_text(figure(profile))
    print(f"{folder / 'profile.svg'} shows it; all figures are in {folder / 'profile.json'}")


def row_path(folder: Path, layers: list[int]) -> Path:
    """Where a finished range lies."""
    return folder / "rows" / f"{layers[0]:03d}-{layers[-1]:03d}.json"


def finished(path: Path, mark: str) -> dict[str, Any] | None:
    """A row that was measured under the same settings, else None."""
    if not path.exists():
        return None
    row = loop.read_json(path)
    return row if row.pop("fingerprint") == mark else None


@functools.partial(jax.jit, static_argnames="recipe")
def _errors(recipe: Recipe, params, teacher_params, mode, batch: samples.Batch):
    """Squared error of the student's velocities and the squared size of the teacher's, sums."""
    batch = samples.wide(batch)
    inputs = batch.x, batch.t_from, batch.text, batch.text_lengths
    u = training.network(recipe, recipe.student, params, mode=mode)(*inputs)
    theirs = batch.u_teacher
    if recipe.velocity == "teacher":
        theirs = training.network(recipe, recipe.teacher, teacher_params)(*inputs)
    return jnp.sum(jnp.square(u - theirs)), jnp.sum(jnp.square(theirs))


class Bench:
    """What all ranges share: pairs to train on and to validate on, fitted maps, prompts, noise."""

    def __init__(self, config, settings, teacher: checkpoints.Checkpoint, workdir: Path):
        own = config.profile
        if config.collect.mode == "online":
            raise UserError("the profile stage needs stored pairs: choose collect.mode 'stored'.")
        pairs = collect.opened(config, workdir, teacher, settings.batch_size)
        training_videos = pairs.num_videos - own.num_validation
        if not (own.num_validation >= 1 and training_videos >= 1):
            raise UserError(
                f"profile.num_validation is {own.num_validation}: choose 1 to below the "
                f"{pairs.num_videos} videos collected."
            )
        self._pairs = pairs.part(range(training_videos))
        self._held = pairs.part(range(training_videos, pairs.num_videos))
        self._config, self._settings, self._teacher = config, settings, teacher
        self._seed = jax.random.key(config.seed)
        self._recipe = transfer.recipe_of(config, settings, pairs.index, teacher)
        self._guidance_scale = pairs.index.made["guidance_scale"]
        self._folder = workdir / "profile" / "samples"
        if own.num_prompts:
            self._prepare_samples()
        self._start = self._fit_maps(workdir / "state" / "profile")

    def _fit_maps(self, folder: Path) -> training.State:
        settings, recipe = self._settings, self._recipe
        schedule = training.warmup_schedule(settings)

        def step(state, i, batch):
            knobs = knobs_at(settings, i, schedule(i), self._guidance_scale, False)
            return training.warmup(recipe, state, batch, knobs)

        return loop.run(
            "feature maps",
            step,
            training.initial_state(settings, recipe.student, self._teacher.transformer),
            num_steps=settings.warmup_steps,
            folder=folder,
            save_every=settings.save_every,
            log_every=settings.log_every,
            data=self._batches(),
        )

    def _batches(self) -> grain.DatasetIterator:
        """Those of training, from the first one on."""
        dataset = transfer.samples_of(self._pairs, self._recipe, self._settings, self._config.seed)
        return loader.batches(dataset, self._recipe.batch_size, num_threads=self._pairs.num_threads)

    def _prepare_samples(self) -> None:
        evaluate = self._config.evaluate.copy_and_resolve_references()
        evaluate.num_prompts = self._config.profile.num_prompts
        self._prompts = chosen_prompts(evaluate)
        self._said = evaluation.said_by(self._prompts)
        self._judge = classifier.load(evaluate.classifier, "latents")
        self._sampling = sampling_settings(evaluate, self._teacher)
        # A batch is always full: a larger one would only be padding.
        self._batch_size = min(evaluate.batch_size, evaluate.num_prompts)
        self._sample_seed = evaluate.seeds[0]
        self._theirs = self._sample(evaluation.TEACHER, self._teacher)

    def _sample(self, name: str, checkpoint: checkpoints.Checkpoint) -> evaluation.Videos:
        contender = evaluation.Contender(name, "after", checkpoint, str(self._teacher.path))
        return evaluation.sample(
            contender, self._prompts, self._sample_seed, self._sampling, self._batch_size,
            self._folder,
        )  # fmt: skip

    def row(self, layers: list[int]) -> dict[str, Any]:
        """The figures of one range.

        error_before, error_after: of the velocity on validation pairs, relative squared error,
        without and with recovery; with prompts all_right, the share of videos with everything
        right, and distance_latents, the distance to the teacher's videos; seconds of all of it.
        """
        began = time.perf_counter()
        num_steps = self._config.profile.num_steps
        # A copy: updates give a state's buffers back, and the next range starts from these too.
        state = selection.placed(jax.tree.map(jnp.copy, self._start), tuple(layers))
        row = {"error_before": self._error(state)}
        schedule = optimizers.warmup_cosine(
            self._settings.learning_rate, num_steps, max(1, num_steps // 10)
        )
        batches = self._batches()
        for i in range(num_steps):
            knobs = knobs_at(self._settings, i, schedule(i + 1), self._guidance_scale, False)
            key = jax.random.fold_in(self._seed, i)
            state, _ = training.update(
                self._recipe, state, self._teacher.transformer, next(batches), knobs, key
            )
        batches.close()
        row["error_after"] = self._error(state)
        if self._config.profile.num_prompts:
            features = self._recipe.student.feature_map
            untrained = evaluation.untrained(self._teacher, layers, features)
            ours = self._sample(
                f"layers_{layers[0]}_{layers[-1]}", replace(untrained, transformer=state["params"])
            )
            columns = evaluation.measure(self._judge, self._said, ours, self._theirs, None)
            row["all_right"] = float(columns["right.all"].mean())
            row["distance_latents"] = float(columns["distance_latents"].mean())
        return row | {"seconds": time.perf_counter() - began}

    def _error(self, state: training.State) -> float:
        total, size = 0.0, 0.0
        draw, rng = samples.Draw(self._held, self._recipe, 0.0, 0), np.random.default_rng(0)
        count = min(self._recipe.batch_size, len(self._held))  # whole batches alone
        for begin in range(0, len(self._held) - count + 1, count):
            drawn = [draw(row, rng) for row in range(begin, begin + count)]
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
            sums = _errors(
                self._recipe, state["params"], self._teacher.transformer, state["mode"], batch
            )
            total, size = total + float(sums[0]), size + float(sums[1])
        return total / size
