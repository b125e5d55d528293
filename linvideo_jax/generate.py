"""A folder of videos from prompts: what is there is kept, what is missing is made."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from convert.tensors import read_json
from linvideo_jax import folders, turns, video
from linvideo_jax.errors import UserError
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.progress import Progress
from linvideo_jax.requests import Request

MANIFEST = "manifest.json"
TOKENS_AT_ONCE = 32_768  # latent pixels; 81 frames of 480 x 832 have 131,040


def default_batch_size(pipeline: Pipeline, requests: Sequence[Request]) -> int:
    """Of equal batches that leave the last one fullest: 5 small videos are made as 3 and 2.

    At most 4 videos and TOKENS_AT_ONCE tokens at a time; a video with more is made alone. All this
    for every device that shares the batch: each has as many videos as the others.
    """
    counts = Counter(request.settings for request in requests)
    shapes = [pipeline.latent_shape(settings) for settings in counts]
    tokens = max(frames * height * width for frames, height, width, _ in shapes)
    devices, at_most = pipeline.batch_devices, max(1, min(4, TOKENS_AT_ONCE // tokens))
    return even_batch_size(-(-max(counts.values()) // devices), at_most) * devices


def even_batch_size(count: int, at_most: int) -> int:
    """The size of equal batches of `count`."""
    return -(-count // -(-count // at_most))


def fingerprint(checkpoint: Any) -> str:
    """A short hash that changes when the transformer is trained on or its linear layers change."""
    made_of = f"{sorted(checkpoint.linear_layers)} {turns.mark(checkpoint, 'transformer')}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def warn_of_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """A line on stderr with the prompts' words that the tokenizer lacks, and those that it has.

    Only a vocabulary of whole words lacks any; the pieces of umt5-xxl spell every word.
    """
    unknown = dict.fromkeys(word for prompt in prompts for word in tokenizer.unknown_words(prompt))
    if unknown:
        print(
            f"warning: the model does not know {', '.join(unknown)}; it knows the words "
            f"{', '.join(tokenizer.words())}.",
            file=sys.stderr,
        )


def plan(
    pipeline: Pipeline,
    requests: Sequence[Request],
    settings: Settings,
    out: Path,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a run in `out`, with what an earlier run there has planned or made.

    `settings`: the run's, of which a video's entry says where it differs; `options`: what else the
    numbers depend on a little. UserError if the folder holds videos that were made otherwise: they
    could not be told apart.
    """
    run = _plain(settings)
    made = {
        "checkpoint": str(pipeline.checkpoint.path),
        "checkpoint_fingerprint": fingerprint(pipeline.checkpoint),
        "settings": run,
        "dtype": str(pipeline.dtype),
        **options,
    }
    videos = {}
    for request in requests:
        own = {k: v for k, v in sorted(_plain(request.settings).items()) if v != run[k]}
        entry = {"prompt": request.prompt, "seed": request.seed}
        videos[request.name] = entry | ({"settings": own} if own else {})
    if (out / MANIFEST).exists():
        before = read_json(out / MANIFEST)
        changed = _differences(before, made) or _clashes(before, videos)
        if changed:
            raise UserError(
                f"{out} holds videos of another run ({changed}): choose another --out or delete it."
            )
        videos = before["videos"] | videos
    return made | {"videos": videos}


def _plain(settings: Settings) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(settings)))


def _differences(before: dict[str, Any], made: dict[str, Any]) -> str:
    if not {*made, "videos"} <= set(before):
        return f"its {MANIFEST} is not of this program"
    if before["checkpoint_fingerprint"] != made["checkpoint_fingerprint"]:
        return f"made with the checkpoint {before['checkpoint']} as it was then"
    return ", ".join(
        f"{name} {before['settings'].get(name)!r} there, {value!r} now"
        for name, value in made["settings"].items()
        if before["settings"].get(name) != value
    )


def _clashes(before: dict[str, Any], videos: dict[str, Any]) -> str:
    for name in before["videos"].keys() & videos.keys():
        if before["videos"][name] != videos[name]:
            return f"{name} has seed {before['videos'][name]['seed']} or other words there"
    return ""


def _clips(
    pipeline: Pipeline,
    groups: Mapping[Settings, Sequence[Request]],
    batch_size: int,
    vae_tiling: bool,
) -> Iterator[tuple[str, Iterator[UInt8[np.ndarray, "frames height width 3"]]]]:
    """(file name, pixels in pieces) of every request; all pieces are taken before the next one."""
    for settings, group in groups.items():
        prompts, seeds = [r.prompt for r in group], [r.seed for r in group]
        for rows, latents in pipeline.batches(prompts, seeds, settings, batch_size):
            for row, one in zip(rows, np.asarray(latents), strict=True):
                pieces = pipeline.decode_pieces(one[None], vae_tiling)
                yield group[row].name, (piece[0] for piece in pieces)


def make_videos(
    pipeline: Pipeline,
    requests: Sequence[Request],
    settings: Settings,
    out: Path,
    *,
    batch_size: int,
    vae_tiling: bool = False,
) -> list[Path]:
    """One mp4 a request in `out`, and the manifest, in which `settings` are those of the run.

    The manifest lists all videos before the first is made. A video's file appears when it is
    complete, so one that exists is finished and is not made again. All prompts are encoded first;
    then videos of the same settings share batches. A file is written while its video is decoded and
    the next one is made.
    """
    for each in {request.settings for request in requests}:
        pipeline.latent_shape(each)  # a wrong size is found before anything is written
    options = {"batch_size": batch_size, "vae_tiling": vae_tiling}
    manifest = plan(pipeline, requests, settings, out, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with folders.replacing(out / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        missing = [request for request in requests if not (out / request.name).exists()]
        groups: dict[Settings, list[Request]] = {}
        for request in missing:
            groups.setdefault(request.settings, []).append(request)
        for each, group in groups.items():
            guided = [each.negative_prompt] if each.guidance_scale > 1 else []
            pipeline.encode([*guided, *(request.prompt for request in group)])
        done = len(requests) - len(missing)
        clips = _clips(pipeline, groups, batch_size, vae_tiling)
        with (
            Progress("sample", len(requests), done, unit="video") as progress,
            ThreadPoolExecutor(1) as writer,
        ):
            writing = None
            for name, pieces in clips:
                if writing is not None:
                    writing.result()
                    progress.add(1)
                writing = video.write_mp4_behind(writer, out / name, pieces)
            if writing is not None:
                writing.result()
                progress.add(1)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    return [out / request.name for request in requests]
