"""Models compared from the same prompts and noise: their latents, and what is measured of them.

All that is made is kept in safetensors files beside a fingerprint of what it was made from: a run
that was interrupted goes on, and nothing of another model or setting is taken for this one's.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from linvideo_jax import checkpoints, generate
from linvideo_jax.data import captions, digits
from linvideo_jax.data.digits import ABSENT, INCONSISTENT, UNSAID, Labels
from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.metrics import agreement, flow, likeness, motion, quality
from linvideo_jax.metrics.classifier import NO_DIRECTION, Classifier
from linvideo_jax.models.wan import initial_feature_map
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.progress import Progress
from linvideo_jax.requests import MAX_SEED, vbench_name
from linvideo_jax.threads import each
from linvideo_jax.video import FPS, write_mp4

Columns = dict[str, np.ndarray]

TEACHER, STUDENT = "teacher", "student"
SAVE_EVERY = 10.0  # seconds of sampling that an interruption may cost
SEED_SPACING = 100_003  # of the noise of two sampling seeds: more videos than an evaluation has


class Contender(NamedTuple):
    """A model to compare.

    role: "teacher", "before" (a student before any training) or "after"; source: the folder of its
    weights; trained_here: whether this run's transfer or distill stage made them; sampling: where
    it is sampled otherwise than the teacher.
    """

    name: str
    role: str
    checkpoint: checkpoints.Checkpoint
    source: str
    trained_here: bool = False
    sampling: Mapping[str, Any] | None = None


def before_name(student: str) -> str:
    """Name of the contender that `student` was before any training."""
    return f"{student}_before"


def file_stem(name: str) -> str:
    """A contender's name as its files begin: letters, digits and underscores, else hyphens."""
    return re.sub(r"\W+", "-", name).strip("-")


def untrained(
    teacher: checkpoints.Checkpoint, linear_layers: Sequence[int], feature_map: str = "hedgehog"
):
    """The teacher with initial feature maps and these layers linear: a student before training."""
    config = replace(teacher.wan_config, feature_map=feature_map)
    blocks = teacher.transformer["blocks"]
    maps = {name: jnp.asarray(value) for name, value in initial_feature_map(config).items()}
    attention = blocks["attn1"] | {"feature_map": maps}
    return replace(
        teacher,
        config={**teacher.config, "linear_layers": list(linear_layers), "feature_map": feature_map},
        wan_config=config,
        transformer=teacher.transformer | {"blocks": blocks | {"attn1": attention}},
    )


def contenders(
    teacher: checkpoints.Checkpoint,
    workdir: Path,
    others: Mapping[str, str],
    others_before: bool = True,
    own_before: bool = True,
    start: str = "",
    others_sampling: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Contender]:
    """The teacher; WORKDIR/final, if it is there; the `others`: each student and its "before".

    others_before, own_before: whether the others, and WORKDIR/final, are compared with what they
    were before any training, too.
    A distilled model is sampled as its own config.json says, and the one of WORKDIR is compared
    with its start, the folder that it was distilled from, cut to as many steps. others_sampling: by
    name, settings in which one differs from the teacher's.
    Text encoder and VAE are the teacher's for all. UserError for a student of other sizes, or a
    name that is taken or unknown.
    """
    found = [Contender(TEACHER, TEACHER, teacher, str(teacher.path))]
    students = dict(others)
    if clash := {TEACHER, STUDENT} & set(students):
        raise UserError(f"evaluate.others names {clash.pop()!r}, which is taken: choose another.")
    others_sampling = others_sampling or {}
    if unknown := set(others_sampling) - set(others):
        raise UserError(
            f"evaluate.others_sampling names {unknown.pop()!r}, which is none of evaluate.others."
        )
    if (workdir / "final").exists():
        students = {STUDENT: str(workdir / "final")} | students
    for name, folder in students.items():
        student, here = _of_family(teacher, folder), name == STUDENT
        sampling = few_steps(student) | dict(others_sampling.get(name, {}))
        found.append(Contender(name, "after", student, folder, here, sampling))
        if not (own_before if here else others_before):
            continue
        if here and start and few_steps(student):
            before = _of_family(teacher, start)
            cut = {"num_inference_steps": sampling["num_inference_steps"]}
            found.append(Contender(before_name(name), "before", before, start, sampling=cut))
        else:
            features = student.wan_config.feature_map or "hedgehog"
            before = untrained(teacher, student.linear_layers, features)
            found.append(Contender(before_name(name), "before", before, str(teacher.path)))
    return found


def _of_family(teacher: checkpoints.Checkpoint, folder: str) -> checkpoints.Checkpoint:
    """The transformer of a folder with the teacher's other networks; UserError for other sizes."""
    own = checkpoints.load(folder, ("transformer",))
    if own.wan_config.to_dict() != teacher.wan_config.to_dict():
        raise UserError(
            f"{folder} has other sizes than {teacher.path}: compare students of one teacher."
        )
    return replace(
        teacher,
        path=own.path,
        config=own.config,
        wan_config=own.wan_config,
        transformer=own.transformer,
    )


def few_steps(checkpoint: checkpoints.Checkpoint) -> dict[str, Any]:
    """How a distilled model is sampled, by its config.json; nothing for another one."""
    own = checkpoint.sampling
    names = ("sampler", "num_inference_steps", "guidance_scale", "flow_shift", "denoising_steps")
    return {name: own[name] for name in names} if own["denoising_steps"] else {}


def stored(path: Path, fingerprint: str) -> Columns | None:
    """The arrays of a file that was written with this fingerprint, else None."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def store(path: Path, fingerprint: str, arrays: Columns) -> None:
    """Writes arrays for `stored`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"fingerprint": fingerprint})


def remembered(path: Path, fingerprint: str, make: Callable[[], Columns]) -> Columns:
    """`make()`, or what it gave before."""
    arrays = stored(path, fingerprint)
    if arrays is None:
        arrays = make()
        store(path, fingerprint, arrays)
    return arrays


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def judged_by(own) -> dict[str, Any]:
    """What of `config.evaluate` figures depend on: all but where the teacher's are kept."""
    return {name: value for name, value in own.to_dict().items() if name != "shared"}


class Videos(NamedTuple):
    """One contender's latents of one seed, and how long they took.

    seconds: all batches; seconds_per_video: the median batch's, so without the compilation.
    """

    latents: Float[np.ndarray, "videos frames height width channels"]
    seconds: float
    seconds_per_video: float
    fingerprint: str


def noise_seed(seed: int, video: int) -> int:
    """Of the video with this number, for every contender."""
    return seed * SEED_SPACING + video


def largest_seed(num_videos: int) -> int:
    """Up to which `noise_seed` of so many videos can be."""
    return (MAX_SEED + 1 - num_videos) // SEED_SPACING


def sample(
    contender: Contender,
    prompts: Sequence[str],
    seed: int,
    settings: Settings,
    batch_size: int,
    folder: Path,
) -> Videos:
    """Latents of all prompts, from the noise of `noise_seed`.

    What an interrupted run has sampled is taken from `folder`.
    """
    pipeline = Pipeline(contender.checkpoint)
    made_from = (generate.fingerprint(contender.checkpoint), asdict(settings), str(pipeline.dtype))
    mark = fingerprint(*made_from, list(prompts), seed, batch_size)
    path = folder / f"{file_stem(contender.name)}-seed{seed}-latents.safetensors"
    arrays = stored(path, mark) or {
        "latents": np.zeros((len(prompts), *pipeline.latent_shape(settings)), np.float32),
        "done": np.zeros(len(prompts), bool),
        "seconds": np.zeros(0),
    }
    latents, done, seconds = arrays["latents"], arrays["done"], list(arrays["seconds"])
    missing = np.flatnonzero(~done).tolist()
    if missing:
        batches = pipeline.batches(
            [prompts[i] for i in missing],
            [noise_seed(seed, i) for i in missing],
            settings,
            batch_size,
        )
        title = f"sample {contender.name}, seed {seed}"
        with Progress(title, len(prompts), int(done.sum()), unit="video") as progress:
            started = saved = time.perf_counter()
            for rows, made in batches:
                where = [missing[row] for row in rows]
                latents[where], done[where] = np.asarray(made), True
                now = time.perf_counter()
                seconds.append(now - started)
                if now - saved > SAVE_EVERY or done.all():
                    arrays["seconds"] = np.array(seconds)
                    store(path, mark, arrays)
                    saved = time.perf_counter()
                progress.update(int(done.sum()))
                started = time.perf_counter()
    return Videos(latents, float(sum(seconds)), float(np.median(seconds)) / batch_size, mark)


def said_by(prompts: Sequence[str]) -> Labels:
    """What the prompts ask for; UserError for one that the digits' captions cannot say."""
    readings = [captions.labels(prompt) for prompt in prompts]
    for prompt, reading in zip(prompts, readings, strict=True):
        if reading is None:
            raise UserError(
                f"the prompt {prompt!r} cannot be judged: name digits, colours and a background "
                "in the words of assets/prompts_digits_test.txt."
            )
    return captions.stack(readings)


def decode(
    teacher: checkpoints.Checkpoint, latents: Float[np.ndarray, "videos f h w c"], batch_size: int
) -> UInt8[np.ndarray, "videos frames height width 3"]:
    """Pixels, decoded batch by batch."""
    pipeline = Pipeline(teacher)
    batches = range(0, len(latents), batch_size)
    return np.concatenate([pipeline.decode(latents[i : i + batch_size]) for i in batches])


def signed(video: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Pixels in [-1, 1], float32."""
    return video.astype(np.float32) / 127.5 - 1


def measure(
    judge: Classifier,
    said: Labels,
    ours: Videos,
    teachers: Videos,
    pixels: Callable[[Videos], UInt8[np.ndarray, "videos frames height width 3"]] | None,
) -> Columns:
    """One row a video: what was right, what was read, the distance to the teacher's video.

    With `pixels`, which decodes, the judge reads those, and the figures of motion and quality and
    the features for the Frechet distance come along; without, it reads the latents.
    """
    columns = {"distance_latents": quality.distance(ours.latents, teachers.latents)}
    if pixels is None:
        reading = judge.read(ours.latents)
    else:
        frames = pixels(ours)
        video = signed(frames)
        reading = judge.read(video)
        columns["features"] = reading.features
        columns["distance_video"] = quality.distance(video, signed(pixels(teachers)))
        for name, values in motion.measure(video, said)._asdict().items():
            columns[f"motion.{name}"] = values
        for figure in (quality.background_consistency, quality.sharpness):
            columns[f"quality.{figure.__name__}"] = np.array(each(figure, video))
    for name, values in agreement.agree(said, reading.labels).items():
        columns[f"right.{name}"] = values
    for name, values in reading.labels._asdict().items():
        columns[f"seen.{name}"] = np.asarray(values)
    return columns


def compare(
    name: str,
    prompts: Sequence[str],
    sample: int,
    ours: Videos,
    teachers: Videos,
    pixels: Callable[
        [Float[np.ndarray, "1 f h w c"]], UInt8[np.ndarray, "1 frames height width 3"]
    ],
    folder: Path,
) -> Columns:
    """One row a video, without a judge: likeness to the teacher's, sharpness and motion.

    Each video is decoded by `pixels`, measured, and written to `folder/vbench/NAME` under the name
    that VBench looks for, as its `sample`-th; what an interrupted run has done is kept. The
    teacher's likeness to itself is NaN.
    """
    rows = []
    title = f"measure {name}, sample {sample}"
    with Progress(title, len(prompts), unit="video") as progress:
        for i, prompt in enumerate(prompts):
            path = folder / "rows" / f"{file_stem(name)}-{sample}-{i:05d}.safetensors"
            video = folder / "vbench" / file_stem(name) / vbench_name(prompt, sample)

            def measured(i=i, video=video):
                both = ours.latents[i : i + 1], teachers.latents[i : i + 1]
                return _compared(*both, ours is teachers, pixels, video)

            mark = fingerprint(ours.fingerprint, teachers.fingerprint, prompt)
            row = stored(path, mark) if video.exists() else None
            if row is None:
                row = measured()
                store(path, mark, row)
            rows.append(row)
            progress.update(i + 1)
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _compared(ours, theirs, same, pixels, path) -> Columns:
    video = pixels(ours)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, video)
    found = flow.flows(video, FPS)
    row = {
        "distance_latents": float(quality.distance(ours, theirs)[0]),
        "motion.speed": flow.speed(found),
        "motion.smoothness": flow.smoothness(found),
        "motion.dynamic_degree": float(flow.is_dynamic(found)),
        "quality.sharpness": quality.sharpness(signed(video)),
    }
    nothing = float("nan")
    row |= {"psnr": nothing, "ssim": nothing, "distance_video": 0.0}
    if not same:
        other = pixels(theirs)[0]
        row["distance_video"] = float(quality.distance(signed(video)[None], signed(other)[None])[0])
        row |= {"psnr": likeness.psnr(video, other), "ssim": likeness.ssim(video, other)}
    return {key: np.array([value], np.float64) for key, value in row.items()}


def real_features(judge: Classifier, count: int, num_frames: int) -> Columns:
    """The judge's features of `count` real clips with digit images not trained on."""
    attributes = digits.sample_attributes(np.random.default_rng(7), count, num_frames, "test")
    images = jnp.asarray(digits.digit_images())
    parts = []
    for begin in range(0, count, 32):
        clips = digits.render(attributes.take(slice(begin, begin + 32)), images, num_frames)
        parts.append(judge.read(np.asarray(clips)).features)
    return {"features": np.concatenate(parts)}


def seen_labels(columns: Columns) -> Labels:
    """What the judge read, out of the columns of `measure`."""
    return Labels(**{name: columns[f"seen.{name}"] for name in Labels._fields})


def describe(said: Labels, seen: Labels, i: int) -> list[tuple[str, bool]]:
    """What was read in video i, in words, each with whether the prompt says so."""
    words = []
    for slot, colour in enumerate(digits.COLOURS):
        named, shown = said.digit[i, slot] != ABSENT, seen.digit[i, slot] != ABSENT
        if named and not shown:
            words.append((f"no {colour} digit", False))
        if not shown:
            continue
        digit = int(seen.digit[i, slot])
        name = "changing digit" if digit == INCONSISTENT else str(digit)
        words.append((f"{colour} {name}", bool(named and digit == said.digit[i, slot])))
        if not named:
            continue
        for field, options in (
            ("direction", [*digits.DIRECTIONS, "no clear way"][: NO_DIRECTION + 1]),
            ("speed", [*digits.SPEEDS]),
            ("bounce", ["straight", "bounces"]),
        ):
            asked, read = getattr(said, field)[i, slot], int(getattr(seen, field)[i, slot])
            words.append((options[read], bool(asked in (UNSAID, read))))
    ground = int(seen.background[i])
    words.append((f"on {list(digits.BACKGROUNDS)[ground]}", bool(ground == said.background[i])))
    return words
