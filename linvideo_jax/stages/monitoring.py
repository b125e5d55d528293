"""What a training stage does beside its steps: frozen layers, samples on the way, the report."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from linvideo_jax import evaluation, folders, loop, report, turns, video
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.metrics import flops
from linvideo_jax.models.wan import LINEAR, MIX
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.parallel import hosts
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.transfer import training

FLAT_SHARE = 0.7  # of the later steps' deviation: trainings that stayed had 0.4, others 0.9
FACTS, SAMPLES = "facts.json", "samples"
FRAMES_SHOWN = 4
LARGEST_SIDE = 240  # px of a frame in a contact sheet


def write_facts(folder: Path, settings, config: WanConfig, tokens: int, text_tokens: int) -> None:
    """What the report needs to draw a run that is not finished, in `folder/facts.json`.

    Shares of FLOPs are of one forward, for each linear layer: of all, and of self-attention.
    """
    softmax = flops.softmax_attention(config, tokens)
    one_less = softmax - flops.linear_attention(config, tokens)
    facts = {
        "num_steps": settings.num_steps,
        "target": settings.target,
        "num_layers": config.num_layers,
        "marks": [[settings.warmup_steps, "maps fitted"], [settings.round_at, "rounded"]],
        "flops_saved_a_layer": flops.saved(config, tokens, (0,), text_tokens),
        "attention_saved_a_layer": one_less / softmax / config.num_layers,
    }
    loop.write_json(folder / FACTS, facts)


def report_every(seconds: float, workdir: Path) -> Callable[[int, Any], None]:
    """An event that writes WORKDIR/report.html, the first time and when so many seconds went by."""
    last = -float("inf")

    def write(step: int, state: Any) -> None:
        nonlocal last
        if hosts.is_first() and time.monotonic() - last >= seconds:
            report.write(workdir)
            last = time.monotonic()

    return write


def frozen_layers(until: int) -> Callable[[int, Any], None]:
    """An event that logs the layers that froze since the last time, up to step `until`."""
    before = None

    def log(step: int, state: Any) -> None:
        nonlocal before
        if step > until:
            return
        mode = np.array(state["mode"])  # a copy, for the next update gives the buffer back
        known = before if before is not None else np.full_like(mode, MIX)
        for layer in np.flatnonzero((known == MIX) & (mode != MIX)):
            kind = "linear" if mode[layer] == LINEAR else "softmax"
            logging.info("layer %d frozen as %s by step %d", layer, kind, step)
        before = mode

    return log


def warn_of_a_flat_first_step(folder: Path) -> None:
    """Warns if a distilled model's first step has stayed near the mean of what prompts allow.

    By the standard deviation of its samples in the second half of the log, beside the later steps'.
    """
    log = [line for line in loop.read_metrics(folder) if "sample_deviation" in line]
    first, later = [], []
    for line in log[len(log) // 2 :]:
        (later if line["exit_step"] else first).append(line["sample_deviation"])
    if first and later and median(first) < FLAT_SHARE * median(later):
        logging.warning(
            "samples of the first step have a standard deviation of %.2f, those of later steps "
            "%.2f: it has stayed near the mean of what a prompt allows. Train again with a smaller "
            "distill.generator_every, or with distill.start_steps.",
            median(first),
            median(later),
        )


class Samples:
    """An event that samples the student as it is, mixed layers mixed, beside the teacher.

    With several hosts the first does it, with its own devices, and has all parameters in memory.

    Both start from the same noise: seed i for prompt i. A contact sheet for each time, the
    teacher's frames above the student's, is in `folder/samples/STEP.webp`.

    Args:
      folder: of the stage's state.
      teacher: the checkpoint, of which the transformer is loaded; its text encoder and VAE serve
        both, and are read from its folder when they are needed.
      student: sizes of the student.
      config: of the run, of whose group evaluate the prompts and the size of the videos are taken.
      count: how many prompts.
      sampling: how the student is sampled, if not as the teacher is.
      weights: where in the state the student's are.
    """

    def __init__(
        self,
        folder: Path,
        teacher,
        student: WanConfig,
        config,
        count: int,
        sampling: Settings | None = None,
        weights: str = "params",
    ):
        self._folder, self._student = folder / SAMPLES, student
        own, self._dtype = config.evaluate, config.dtype
        self._teacher = turns.open_folder(teacher.path)
        if not hosts.several():
            self._teacher = replace(self._teacher, transformer=teacher.transformer)
        self._placement = Placement.of_host(config, student.num_attention_heads)
        self._prompts = prompt_files.read(own.prompts)[:count]
        size = {"height": own.height, "width": own.width, "num_frames": own.num_frames}
        self._settings = Settings.of(teacher, **size, **own.sampling)
        self._sampling, self._weights = sampling or self._settings, weights
        self._pipeline = Pipeline(self._teacher, self._dtype, placement=self._placement)
        self._pipeline.latent_shape(self._settings)  # a wrong size is told before training

    def __call__(self, step: int, state: Any) -> None:
        path = self._folder / f"{step:07d}.webp"
        if path.exists():
            return
        params, mode, r = state[self._weights], state["mode"], state["r"]
        if hosts.several():
            params, mode, r = whole((params, mode, r))
            if not hosts.is_first():
                return
            params = self._placement.params(training.frozen(params, self._dtype))
        student = replace(
            self._teacher,
            transformer=params,
            wan_config=self._student,
            config={**self._teacher.config, "linear_layers": []},
        )
        ours = Pipeline(student, self._dtype, placement=self._placement)
        ours.texts = self._pipeline.texts
        if self._student.feature_map is not None:
            ours.mode, ours.r = mode, r
        self._folder.mkdir(parents=True, exist_ok=True)
        frames = self._frames(ours, self._sampling)
        sheet = contact_sheet([self._teachers(), frames])
        with folders.replacing(path) as temporary:
            Image.fromarray(sheet).save(temporary, format="webp", quality=80)

    def _teachers(self) -> UInt8[np.ndarray, "videos frames height width 3"]:
        mark = evaluation.fingerprint(self._prompts, repr(self._settings))
        path = self._folder / "teacher.safetensors"
        make = lambda: {"frames": self._frames(self._pipeline, self._settings)}  # noqa: E731
        return evaluation.remembered(path, mark, make)["frames"]

    def _frames(
        self, pipeline: Pipeline, settings: Settings
    ) -> UInt8[np.ndarray, "videos frames height width 3"]:
        """A few frames of each video, one video at a time on the device."""
        found = []
        for seed, prompt in enumerate(self._prompts):
            latents = pipeline.latents([prompt], [seed], settings, 1)
            clip = self._pipeline.decode(latents)[0]
            found.append(clip[video.spread(len(clip), FRAMES_SHOWN)])
        return np.stack(found)


def contact_sheet(
    rows: list[UInt8[np.ndarray, "videos frames height width 3"]],
) -> UInt8[np.ndarray, "height width 3"]:
    """The frames of every video side by side, its rows under each other, small."""
    height, width = rows[0].shape[2:4]
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def strip(clip):
        small = [np.asarray(Image.fromarray(frame).resize(size)) for frame in clip]
        return np.concatenate(small, axis=1)

    videos = [np.stack([strip(row[i]) for row in rows]) for i in range(len(rows[0]))]
    gap = np.full((6, *videos[0].shape[2:]), 255, np.uint8)
    parts = [part for clip in videos for part in (*clip, gap)]
    return np.concatenate(parts[:-1])
