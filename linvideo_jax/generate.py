"""A folder of videos from prompts: what is there is kept, what is missing is made."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.tensors import read_json
from linvideo_jax import video
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.errors import UserError
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.progress import Progress

MANIFEST = "manifest.json"
MAX_SEED = 2**32 - 1


def choose_prompts(prompt: str | None, path: str | None) -> list[str]:
    """The one prompt, or those of a file; UserError unless exactly one of the two is given."""
    if (prompt is None) == (path is None):
        raise UserError("give either --prompt with one sentence or --prompts with a file of them.")
    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt is empty: say what the video shows.")
        return [prompt.strip()]
    return prompt_files.read(path)


def check_seeds(seed: int, count: int) -> None:
    """UserError unless seed, seed + 1, ... of `count` videos are all valid."""
    if not 0 <= seed <= MAX_SEED + 1 - count:
        raise UserError(f"seed is {seed}: choose one from 0 to {MAX_SEED + 1 - count}.")


def even_batch_size(count: int, at_most: int = 4) -> int:
    """The size of equal batches that leaves the last one fullest: 5 videos are made as 3 and 2."""
    batches = -(-count // at_most)
    return -(-count // batches)


def file_name(index: int, prompt: str) -> str:
    """`0007-a-red-3-moves-right.mp4`: the prompt's place, and its words as far as they fit."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{index:04d}-{words}.mp4" if words else f"{index:04d}.mp4"


def fingerprint(checkpoint: Any) -> str:
    """A short hash that changes when the transformer is trained on or its linear layers change."""
    digest = hashlib.sha256(repr(sorted(checkpoint.linear_layers)).encode())
    for leaf in jax.tree.leaves(checkpoint.transformer["proj_out"]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


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
    prompts: Sequence[str],
    seed: int,
    settings: Settings,
    batch_size: int,
    out: Path,
) -> dict[str, Any]:
    """The manifest of a run in `out`, with what an earlier run there has planned or made.

    UserError if the folder holds videos that were made otherwise: they could not be told apart.
    """
    made = {
        "checkpoint": str(pipeline.checkpoint.path),
        "checkpoint_fingerprint": fingerprint(pipeline.checkpoint),
        "settings": asdict(settings),
        "dtype": str(pipeline.dtype),
        "batch_size": batch_size,
    }
    videos = {
        file_name(i, prompt): {"prompt": prompt, "seed": seed + i}
        for i, prompt in enumerate(prompts)
    }
    if (out / MANIFEST).exists():
        before = read_json(out / MANIFEST)
        changed = _differences(before, made) or _clashes(before, videos)
        if changed:
            raise UserError(
                f"{out} holds videos of another run ({changed}): choose another --out or delete it."
            )
        videos = before["videos"] | videos
    return made | {"videos": videos}


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


def make_videos(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seed: int,
    settings: Settings,
    batch_size: int,
    out: Path,
) -> list[Path]:
    """One mp4 a prompt in `out`, and the manifest; the video of prompt i has seed `seed + i`.

    The manifest lists all videos before the first is made. A video's file appears when it is
    complete, so one that exists is finished and is not made again.
    """
    pipeline.latent_shape(settings)  # a wrong size is found before anything is written
    manifest = plan(pipeline, prompts, seed, settings, batch_size, out)
    names = [file_name(i, prompt) for i, prompt in enumerate(prompts)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with video.replacing(out / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        missing = [i for i, name in enumerate(names) if not (out / name).exists()]
        done = len(names) - len(missing)
        with Progress("sample", len(names), done, unit="video") as progress:
            batches = pipeline.batches(
                [prompts[i] for i in missing], [seed + i for i in missing], settings, batch_size
            )
            for rows, latents in batches:
                for row, one in zip(rows, latents, strict=True):
                    video.write_mp4(out / names[missing[row]], pipeline.decode(one[None])[0])
                    done += 1
                    progress.update(done)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
    return [out / name for name in names]
