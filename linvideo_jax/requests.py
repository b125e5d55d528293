"""What sample.py is asked for: one `Request` a video, from a prompt or a file of them."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.errors import UserError
from linvideo_jax.pipeline import Settings, check_settings

MAX_SEED = 2**32 - 1
# Bytes of a name that file systems take are 255; a temporary one has ".", ".part" around it.
LONGEST_NAME = 240

_KINDS = {"prompt": str, "seed": int} | {field.name: field.type for field in fields(Settings)}
_KINDS["denoising_steps"] = list
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list of numbers"}


@dataclass(frozen=True)
class Row:
    """One line of the input. `place`: how messages name it; `given`: settings of its own."""

    prompt: str
    seed: int | None
    given: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class Request:
    """One video: the name of its file, and all that it is made from."""

    name: str
    prompt: str
    seed: int
    settings: Settings


def read_rows(prompt: str | None, path: str | None) -> list[Row]:
    """The one prompt, or the lines of a text file or of a .jsonl file.

    A jsonl line is an object with `prompt` and any of `seed` and the fields of `Settings`.
    UserError unless exactly one of the two is given, and for a line that is broken or out of range,
    which it names.
    """
    if (prompt is None) == (path is None):
        raise UserError("give either --prompt with one sentence or --prompts with a file of them.")
    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt is empty: say what the video shows.")
        return [Row(_unicode(prompt.strip(), "--prompt"), None, {}, "--prompt")]
    if Path(path).suffix == ".jsonl":
        lines = prompt_files.read_lines(path)
        return [_row(line, f"row {number} of {path}") for number, line in lines]
    prompts = prompt_files.read(path)
    return [Row(text, None, {}, f"prompt {i} of {path}") for i, text in enumerate(prompts, 1)]


def _row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): write one object a line.") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{place} has no prompt: write {{"prompt": "what the video shows"}}.')
    for key, value in values.items():
        if key not in _KINDS:
            raise UserError(f"{place} has the unknown key {key!r}: known are {', '.join(_KINDS)}.")
        kind = _KINDS[key]
        fits = (int, float) if kind is float else kind
        wrong = not isinstance(value, fits) or isinstance(value, bool)
        if wrong or (kind is list and not all(type(step) in (int, float) for step in value)):
            raise UserError(f"{place}: {key} is {value!r}, but it must be {_WORDS[kind]}.")
        if kind is str:
            _unicode(value, place)
    prompt, seed = values.pop("prompt").strip(), values.pop("seed", None)
    if not prompt:
        raise UserError(f"{place} has an empty prompt: say what the video shows.")
    _named(place, lambda: check_settings(**values))
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"{place}: seed is {seed}: choose one from 0 to {MAX_SEED}.")
    return Row(prompt, seed, values, place)


def _unicode(text: str, place: str) -> str:
    """The text, unless it has halves of surrogate pairs, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} has text that is no Unicode: write it in UTF-8.") from None
    return text


def _named(place: str, check: Callable[[], Any]) -> Any:
    """`check()`, whose UserError is made to name the row."""
    try:
        return check()
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def check_seeds(seed: int, videos: int) -> None:
    """UserError unless seed, seed + 1, ... of so many videos are all valid."""
    if not 0 <= seed <= MAX_SEED + 1 - videos:
        raise UserError(f"seed is {seed}: choose one from 0 to {MAX_SEED + 1 - videos}.")


def make_requests(
    rows: Sequence[Row],
    settings: Settings,
    seed: int,
    *,
    num_samples: int = 1,
    vbench_names: bool = False,
    check: Callable[[Settings], Any] = lambda settings: None,
) -> list[Request]:
    """`num_samples` videos of each row, in order.

    The k-th sample of row i has seed `seed + i * num_samples + k`, or the row's own seed + k.
    `check`: raises UserError for settings that the model cannot make. UserError, too, for a prompt
    that is there twice if its file is named by it.
    """
    made: dict[str, tuple[Request, Row]] = {}
    for i, row in enumerate(rows):
        mine = _named(row.place, lambda given=row.given: settings.changed(given))
        if row.given:
            _named(row.place, lambda mine=mine: check(mine))
        first = seed + i * num_samples if row.seed is None else row.seed
        if first + num_samples - 1 > MAX_SEED:
            raise UserError(
                f"{row.place}: seed is {first}, too large for {num_samples} samples: "
                f"choose {MAX_SEED + 1 - num_samples} or less."
            )
        for k in range(num_samples):
            if vbench_names:
                name = vbench_name(row.prompt, k)
            else:
                name = file_name(i, row.prompt, k if num_samples > 1 else None)
            if name in made:
                raise UserError(
                    f"{made[name][1].place} and {row.place} are the same prompt, whose videos "
                    "would have one name: remove one of them, or --vbench_names."
                )
            made[name] = Request(name, row.prompt, first + k, mine), row
    return [request for request, _ in made.values()]


def file_name(index: int, prompt: str, sample: int | None = None) -> str:
    """`0007-a-red-3-moves-right.mp4`: the prompt's place, and its words as far as they fit."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    parts = [f"{index:04d}", words, "" if sample is None else str(sample)]
    return "-".join(part for part in parts if part) + ".mp4"


def vbench_name(prompt: str, sample: int) -> str:
    """`PROMPT-INDEX.mp4`, as VBench expects it.

    A prompt that no file system takes (slashes, control characters, a leading dot, a length beyond
    240 bytes) is changed, and then ends in a hash, so that no two prompts share a name.
    """
    safe = re.sub(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]", "_", prompt)
    safe = re.sub(r"^\.", "_", safe).encode()
    end = f"-{sample}.mp4"
    if safe != prompt.encode() or len(safe) + len(end) > LONGEST_NAME:
        mark = hashlib.sha256(prompt.encode()).hexdigest()[:12]
        end = f"-{mark}{end}"
        safe = safe[: LONGEST_NAME - len(end)]
    return safe.decode(errors="ignore") + end
