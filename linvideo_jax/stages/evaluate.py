"""Stage evaluate: teacher and students from the same prompts and noise, measured and shown.

Writes `workdir/evaluate/metrics.json`, its figures as `table.md`, mp4 files and a contact sheet of
the first videos, and `workdir/report.html`.
Moving digits are judged by a classifier. Without one (`evaluate.classifier` is empty), as for real
Wan, videos are compared with the teacher's, their motion is measured, and all of them are written
to `workdir/evaluate/vbench/NAME` under the names that VBench looks for.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from linvideo_jax import checkpoints, evaluation, loop, report, video, workdirs
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.data.digits import Labels
from linvideo_jax.errors import UserError, check_counts
from linvideo_jax.evaluation import (
    TEACHER,
    Columns,
    Contender,
    Videos,
    before_name,
    file_stem,
)
from linvideo_jax.folders import replacing
from linvideo_jax.metrics import agreement, classifier, diversity, flops, frechet, quality
from linvideo_jax.pipeline import Pipeline, Settings, text_bucket
from linvideo_jax.provenance import made_here
from linvideo_jax.report import comparison

READS = ("latents", "pixels")
ON_SHEET = 4  # prompts


def run(config, workdir: Path) -> None:
    """Compares the teacher, `workdir/final` if it is there, and `evaluate.others`."""
    check(config)
    own, workdir = config.evaluate, Path(workdir)
    folder = workdir / "evaluate"
    prompts = chosen_prompts(own)
    judge, said = None, None
    if own.classifier:
        said, judge = evaluation.said_by(prompts), classifier.load(own.classifier, own.reads)
    else:
        check_unjudged(own.reads, prompts)
    teacher = checkpoints.load(config.get("teacher") or config.checkpoint)
    settings = sampling_settings(own, teacher)
    field = evaluation.contenders(
        teacher,
        workdir,
        own.others,
        own.get("others_before", True),
        own.get("own_before", True),
        start=config.checkpoint if config.get("teacher") else "",
        others_sampling=own.get("others_sampling"),
    )
    settings_of = {one.name: settings.changed(one.sampling or {}) for one in field}

    decode = functools.partial(evaluation.decode, teacher, batch_size=own.batch_size)
    shared = Path(own.get("shared") or folder)  # what is the teacher's and real clips'
    videos, columns = {}, {}
    # Rows of a sweep that run side by side wait for what is shared, and find it made.
    alone = functools.partial(workdirs.held, shared, ".lock", wait=True)
    alone = alone if own.get("shared") else nullcontext

    def judged(one: Contender, seed: int, place: Path, pixels: Callable | None) -> Columns:
        """What the classifier reads in a contender's videos, once for all runs."""
        made, teachers = videos[one.name, seed], videos[TEACHER, seed]
        return evaluation.remembered(
            place / f"{file_stem(one.name)}-seed{seed}-read-{own.reads}.safetensors",
            evaluation.fingerprint(made.fingerprint, teachers.fingerprint, judge.validation),
            functools.partial(evaluation.measure, judge, said, made, teachers, pixels),
        )

    for sample, seed in enumerate(own.seeds):
        pixels = None
        for one in field:  # the teacher first
            with alone() if one.name == TEACHER else nullcontext():
                place = shared if one.name == TEACHER else folder
                given = (prompts, seed, settings_of[one.name], own.batch_size, place)
                videos[one.name, seed] = evaluation.sample(one, *given)
                if judge and own.reads == "pixels" and one.name == TEACHER:
                    kept = shared / f"teacher-seed{seed}-pixels.safetensors"
                    kept = kept if own.get("shared") else None
                    pixels = _decoder(decode, videos[one.name, seed], kept)
                if judge:
                    columns[one.name, seed] = judged(one, seed, place, pixels)
                else:
                    pair = videos[one.name, seed], videos[TEACHER, seed]
                    columns[one.name, seed] = evaluation.compare(
                        one.name, prompts, sample, *pair, decode, folder
                    )
    real = None
    if judge and own.reads == "pixels":
        count = len(prompts) * len(own.seeds)
        mark = evaluation.fingerprint(judge.validation, count, own.num_frames)
        make = functools.partial(evaluation.real_features, judge, count, own.num_frames)
        with alone():
            real = evaluation.remembered(shared / "real.safetensors", mark, make)["features"]

    metrics = {
        "made": made_by(config, settings, field[0]),
        "ceiling": ceiling(judge, own.reads, own.num_frames) if judge else None,
        "contenders": {
            one.name: summary(one, own.seeds, videos, columns, settings_of[one.name], prompts, real)
            for one in field
        },
        "students": {
            one.name: gap(one.name, own.seeds, columns)
            for one in field
            if judge and (before_name(one.name), own.seeds[0]) in columns
        },
        "shown": show(field, own, prompts, said, videos, columns, decode, folder),
    }
    loop.write_json(folder / "metrics.json", metrics)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(comparison.table(metrics), encoding="utf-8")
    report.write(workdir)
    print(report.text(metrics))
    print(f"{workdir / 'report.html'} shows it; all figures are in {folder / 'metrics.json'}")


def check(config) -> None:
    """UserError for values of `config.evaluate` that cannot be."""
    own = config.evaluate
    if own.reads not in READS:
        raise UserError(f"evaluate.reads is {own.reads!r}: choose one of {', '.join(READS)}.")
    check_counts("evaluate", own, ("num_prompts", "batch_size"))
    largest = evaluation.largest_seed(own.num_prompts)
    if not own.seeds or not all(0 <= seed <= largest for seed in own.seeds):
        raise UserError(
            f"evaluate.seeds is {tuple(own.seeds)}: choose one or more from 0 to {largest}."
        )
    chosen_prompts(own)


def check_unjudged(reads: str, prompts: list[str]) -> None:
    """UserError for what cannot be measured without a classifier."""
    if reads != "pixels":
        raise UserError(
            f"evaluate.reads is {reads!r}, but without evaluate.classifier it is videos that are "
            "compared: choose pixels."
        )
    twice = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) > 1]
    if twice:
        raise UserError(
            f"the prompt {twice[0]!r} is there twice, and VBench's names are the prompts: remove "
            "one of them from evaluate.prompts."
        )


def chosen_prompts(own) -> list[str]:
    """The first `num_prompts` of the file; UserError if it has fewer."""
    prompts = prompt_files.read(own.prompts)
    if len(prompts) < own.num_prompts:
        raise UserError(
            f"{own.prompts} has {len(prompts)} prompts: choose evaluate.num_prompts up to that."
        )
    return prompts[: own.num_prompts]


def sampling_settings(own, teacher: checkpoints.Checkpoint) -> Settings:
    """How all contenders are sampled: as `config.evaluate` says, else as the teacher's defaults."""
    size = {name: own[name] for name in ("height", "width", "num_frames")}
    return Settings.of(teacher, **(size | own.sampling.to_dict()))


def _decoder(decode: Callable, teachers: Videos, path: Path | None) -> Callable[..., np.ndarray]:
    """Videos to pixels; the teacher's, with which all are compared, are decoded once.

    path: where they are kept for other runs, or None.
    """

    @functools.cache
    def theirs():
        make = functools.partial(decode, teachers.latents)
        if path is None:
            return make()
        return evaluation.remembered(path, teachers.fingerprint, lambda: {"pixels": make()})[
            "pixels"
        ]

    def pixels(videos: Videos) -> np.ndarray:
        same = videos.fingerprint == teachers.fingerprint
        return theirs() if same else decode(videos.latents)

    return pixels


def made_by(config, settings: Settings, teacher: Contender) -> dict[str, Any]:
    """How, where and when these figures came about."""
    return {
        **made_here(),
        "dtype": str(Pipeline(teacher.checkpoint).dtype),
        "settings": asdict(settings),
        "config": config.to_dict(),
    }


def ceiling(judge: classifier.Classifier, reads: str, num_frames: int) -> dict[str, float] | None:
    """The judge's agreement with the truth on real clips of this length, None if not on file.

    Of pixels it is that after the VAE's round trip, which every sample passes too.
    """
    view = "round_trip" if reads == "pixels" else "clean"
    return judge.validation.get(f"{view}_{num_frames}_frames")


def summary(
    one: Contender,
    seeds: tuple[int, ...],
    videos: dict[tuple[str, int], Videos],
    columns: dict[tuple[str, int], Columns],
    settings: Settings,
    prompts: list[str],
    real: np.ndarray | None,
) -> dict[str, Any]:
    """A contender's entry of metrics.json; shares with Wilson's interval, over all seeds."""
    tables = [columns[one.name, seed] for seed in seeds]
    pooled = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    right = {name[6:]: values for name, values in pooled.items() if name.startswith("right.")}
    config = one.checkpoint.wan_config
    shape = Pipeline(one.checkpoint).latent_shape(settings)
    tokens = flops.video_tokens(config, shape)
    text = text_bucket(int(max(one.checkpoint.tokenizer.encode(prompts)[1])))
    layers = one.checkpoint.linear_layers
    result = {
        "role": one.role,
        "source": one.source,
        "trained_here": one.trained_here,
        "linear_layers": list(layers),
        "num_layers": config.num_layers,
        "num_videos": len(pooled["distance_latents"]),
        "agreement": {
            name: {"rate": float(np.mean(values)), "interval": agreement.wilson(values)}
            for name, values in right.items()
        },
        "per_seed": {
            str(seed): agreement.rates({name: table[f"right.{name}"] for name in right})
            for seed, table in zip(seeds, tables, strict=True)
        },
        "distance_latents": float(pooled["distance_latents"].mean()),
        "tokens": tokens,
        "flops_per_forward": flops.forward(config, tokens, layers, text),
        "flops_saved": flops.saved(config, tokens, layers, text),
        "sampling": asdict(settings),
        "seconds": sum(videos[one.name, seed].seconds for seed in seeds),
        "seconds_per_video": float(
            np.median([videos[one.name, seed].seconds_per_video for seed in seeds])
        ),
    }
    if "distance_video" in pooled:
        result["distance_video"] = float(pooled["distance_video"].mean())
        for name, values in pooled.items():
            if name.startswith(("motion.", "quality.", "psnr", "ssim")):
                found = values[np.isfinite(values)]
                result[name] = float(found.mean()) if len(found) else None
    if len(seeds) > 1:
        spreads = [
            diversity.spread(np.stack([videos[name, seed].latents for seed in seeds]))
            for name in (one.name, TEACHER)
        ]
        result["diversity"], *result["diversity_interval"] = diversity.kept(*spreads)
    if real is not None:
        result["motion.dynamic_degree"] = quality.dynamic_degree(pooled["motion.speed"])
        enough = len(real) > real.shape[1]  # or the covariance has no full rank
        result["frechet"] = frechet.frechet_distance(pooled["features"], real) if enough else None
    return result


def gap(name: str, seeds: tuple[int, ...], columns: dict[tuple[str, int], Columns]):
    """How much of the distance from untrained student to teacher the training has closed."""

    trio = (TEACHER, before_name(name), name)

    def right(contender, some):
        return np.stack([columns[contender, seed]["right.all"] for seed in some])

    def closed(some):
        figures = agreement.gap_closed(*(right(one, some) for one in trio))
        return [figure if np.isfinite(figure) else None for figure in figures]

    share, low, high = closed(seeds)
    teacher, before, after = (right(one, seeds).mean() for one in trio)
    return {
        "teacher": float(teacher),
        "before": float(before),
        "after": float(after),
        "gap_closed": share,
        "interval": [low, high],
        "per_seed": {str(seed): closed([seed])[0] for seed in seeds},
    }


def show(
    field: list[Contender],
    own,
    prompts: list[str],
    said: Labels | None,
    videos: dict[tuple[str, int], Videos],
    columns: dict[tuple[str, int], Columns],
    decode: Callable,
    folder: Path,
) -> list[dict[str, Any]]:
    """The first `num_shown` prompts of the first seed: mp4 files, and what was read in them.

    The first `ON_SHEET` of them are side by side in `contact_sheet.png`, too.
    """
    seed, count = own.seeds[0], min(own.num_shown, len(prompts))
    shown = [{"prompt": prompt, "videos": {}} for prompt in prompts[:count]]
    rows = []
    for one in field:
        made = videos[one.name, seed]
        make = functools.partial(decode, made.latents[:count])
        frames = evaluation.remembered(
            folder / f"{file_stem(one.name)}-shown.safetensors",
            evaluation.fingerprint(made.fingerprint, count),
            lambda make=make: {"frames": make()},
        )["frames"]
        rows.append((one.name, frames))
        seen = evaluation.seen_labels(columns[one.name, seed]) if said else None
        for i, entry in enumerate(shown):
            path = folder / "videos" / f"{i:02d}-{file_stem(one.name)}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            video.write_mp4(path, frames[i])
            read = evaluation.describe(said, seen, i) if said else []
            entry["videos"][one.name] = {"file": str(path.relative_to(folder)), "read": read}
    if shown:
        sheet = comparison.contact_sheet(rows, prompts[: min(count, ON_SHEET)])
        video.write_png(folder / "contact_sheet.png", sheet)
    return shown
