"""English sentences for clips of moving digits, and their reading back into labels.

A sentence names every judged attribute: digit, colour, direction, speed, straight or bouncing, and
background, in at most MAX_WORDS words. `labels` reads any of these wordings.
"""

import argparse
import functools
import re
from pathlib import Path

import numpy as np

from linvideo_jax.data import prompts
from linvideo_jax.data.digits import (
    ABSENT,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SPEEDS,
    UNSAID,
    Attributes,
    Labels,
    sample_attributes,
)
from linvideo_jax.folders import replacing

MAX_WORDS = 29

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SUBJECTS = ("a {c} {k}", "the {c} {k}", "a {c} digit {k}", "a {k} in {c}")
_VERBS = (("moves", "moving"), ("goes", "going"), ("travels", "traveling"), ("glides", "gliding"))
_PACES = {"slowly": ("slowly", "gently"), "quickly": ("quickly", "fast", "rapidly")}
_WAYS = {
    "right": ("right", "to the right", "rightward"),
    "left": ("left", "to the left", "leftward"),
    "up": ("up", "upward"),
    "down": ("down", "downward"),
    "up right": ("up right", "up and right"),
    "up left": ("up left", "up and left"),
    "down right": ("down right", "down and right"),
    "down left": ("down left", "down and left"),
}
# {s} subject, {v} moves, {g} moving, {p} pace, {d} direction; index 0 straight, 1 bouncing.
# Of each list the last wording is kept for clips of one digit, as are the longer subjects.
_CLAUSES = (
    (
        "{s} {v} {p} straight {d}",
        "{s} {v} straight {d} {p}",
        "{s} {p} {v} straight {d}",
        "{s} {v} {d} {p} without bouncing",
        "{s} {v} {p} {d} in a straight line",
    ),
    (
        "{s} {v} {p} {d} and bounces",
        "{s} {v} {d} {p} and bounces",
        "{s} {p} {v} {d} and bounces",
        "{s} {v} {p} {d} then bounces back",
        "{s} {v} {d} {p} and bounces off",
    ),
)
_PHRASES = (
    ("{s} {g} {p} straight {d}", "{s} {g} straight {d} {p}", "{s} {g} {p} {d} without bouncing"),
    ("{s} {g} {p} {d} and bouncing", "{s} {g} {d} {p} and bouncing", "{s} {p} {g} {d}, bouncing"),
)
_GROUNDS = ("on a {b} background", "over a {b} background", "against the {b} background")
# {x} what happens, {b} the background phrase; a word more or less than its neighbour at most.
_SENTENCES = ("{x} {b}", "{x} {b}", "{b} {x}", "{b}, {x}")
_PICTURES = ("{x} {b}", "there is {x} {b}", "{b} there is {x}", "a video of {x} {b}")
_JOINTS = (" and ", " while ", ", ")

_BEFORE_VOWEL = re.compile(r"\ba(?= (?:orange|eight|8)\b)")

_COLOURS, _GROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_DIRECTIONS, _SPEEDS = tuple(DIRECTIONS), tuple(SPEEDS)


def captions(attributes: Attributes, rng: np.random.Generator) -> list[str]:
    """One sentence for each clip, its wording drawn from rng."""
    n = len(attributes.background)
    draws = rng.integers(2**31, size=(n, 18)).tolist()
    columns = (
        attributes.digit, attributes.colour, attributes.direction, attributes.speed,
        attributes.bounce,
    )  # fmt: skip
    digits = np.stack(columns, -1).tolist()
    grounds = np.asarray(attributes.background).tolist()
    return [_sentence(*clip) for clip in zip(digits, grounds, draws, strict=True)]


def caption(attributes: Attributes, rng: np.random.Generator, i: int) -> str:
    """A sentence for clip i; `captions` is the fast way to many."""
    return captions(attributes.take(slice(i, i + 1)), rng)[0]


def _sentence(digits, ground, draws):
    # Both digits of a sentence share the kind of wording: moves ..., or moving ....
    pictured = draws[0] % 3 == 0
    there = [digit for digit in digits if digit[0] >= 0]
    parts = [
        _clause(digit, _PHRASES if pictured else _CLAUSES, draws[6 + 6 * slot :], len(there) == 1)
        for slot, digit in enumerate(there)
    ]
    if draws[1] % 2:
        parts.reverse()
    joint = _JOINTS[draws[2] % (1 if pictured else len(_JOINTS))]
    sentence = _pick(_PICTURES if pictured else _SENTENCES, draws[3])
    background = _pick(_GROUNDS, draws[4]).format(b=_GROUND_NAMES[ground])
    text = sentence.format(x=joint.join(parts), b=background)
    return _BEFORE_VOWEL.sub("an", text)


def _clause(digit, wordings, draws, alone):
    number, colour, direction, speed, bounce = digit
    verb = _pick(_VERBS, draws[3])
    number = str(number) if draws[0] % 2 else _NUMBERS[number]
    subjects, wordings = _SUBJECTS, wordings[bounce]
    if not alone:
        subjects, wordings = subjects[:2], wordings[:-1]
    return _pick(wordings, draws[2]).format(
        s=_pick(subjects, draws[1]).format(c=_COLOURS[colour], k=number),
        v=verb[0],
        g=verb[1],
        p=_pick(_PACES[_SPEEDS[speed]], draws[4]),
        d=_pick(_WAYS[_DIRECTIONS[direction]], draws[5]),
    )


def _pick(options, draw):
    return options[draw % len(options)]


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All words of all wordings, sorted (the comma is no word)."""
    texts = [*_COLOURS, *_GROUND_NAMES, *_NUMBERS, *map(str, range(10)), "an", *_SUBJECTS]
    texts += [*_GROUNDS, *_SENTENCES, *_PICTURES, *_JOINTS]
    for group in (*_VERBS, *_PACES.values(), *_WAYS.values(), *_CLAUSES, *_PHRASES):
        texts += group
    return tuple(sorted(set(re.findall(r"[a-z0-9]+", re.sub(r"{\w}", " ", " ".join(texts))))))


_READ_NUMBER = {w: i for i, w in enumerate(_NUMBERS)} | {str(i): i for i in range(10)}
_READ_PACE = {w: i for i, name in enumerate(_SPEEDS) for w in _PACES[name]}
_READ_WAY = {
    w: name for name in ("right", "left", "up", "down") for w in (name, name + "ward")
}  # fmt: skip


def labels(sentence: str) -> Labels | None:
    """Reads a sentence in our words: labels per colour slot, UNSAID where it leaves one open.

    None where it cannot be read: a foreign word, no digit or more than two, two of one colour, a
    contradiction, or no background.
    """
    words = re.findall(r"[a-z0-9]+", sentence.lower())
    if not words or not set(words) <= set(vocabulary()):
        return None
    grounds = [w for w in words if w in BACKGROUNDS]
    subjects = _subjects(words)
    if len(grounds) != 1 or not subjects or len(subjects) > 2:
        return None
    slots = np.full((4, len(_COLOURS)), UNSAID, np.int32)
    slots[0] = ABSENT
    ends = [start for start, _, _ in subjects[1:]] + [len(words)]
    for (start, colour, number), end in zip(subjects, ends, strict=True):
        motion = _motion(words[start:end])
        if motion is None or slots[0, colour] != ABSENT:
            return None
        slots[:, colour] = (number, *motion)
    return Labels(*slots, np.int32(_GROUND_NAMES.index(grounds[0])))


def _subjects(words):
    """(first word, colour, digit) of each digit named; empty if a colour or a number is left."""
    found, i = [], 0
    while i < len(words):
        here = [w for w in words[i : i + 3] if w not in ("digit", "in")][:2]
        if words[i] in COLOURS or words[i] in _READ_NUMBER:
            colour = [w for w in here if w in COLOURS]
            number = [w for w in here if w in _READ_NUMBER]
            if len(colour) != 1 or len(number) != 1:
                return []
            found.append((i, _COLOURS.index(colour[0]), _READ_NUMBER[number[0]]))
            i = max(words.index(colour[0], i), words.index(number[0], i))
        i += 1
    return found


def _motion(words):
    """(direction, speed, bounce) of one digit's words, or None if they contradict each other."""
    ways = {_READ_WAY[w] for w in words if w in _READ_WAY}
    way = [w for w in ("up", "down", "right", "left") if w in ways]
    paces = {_READ_PACE[w] for w in words if w in _READ_PACE}
    straight = "straight" in words or "without" in words
    bounces = "without" not in words and any(w.startswith("bounc") for w in words)
    direction = " ".join(way)
    if (way and direction not in DIRECTIONS) or len(paces) > 1 or (straight and bounces):
        return None
    return (
        _DIRECTIONS.index(direction) if way else UNSAID,
        paces.pop() if paces else UNSAID,
        int(bounces) if straight or bounces else UNSAID,
    )


def stack(readings: list[Labels]) -> Labels:
    """Labels of several sentences in one, with a leading axis."""
    return Labels(*(np.stack(field) for field in zip(*readings, strict=True)))


def said(sentence: str) -> bytes:
    """What a sentence of `captions` asks for, the same for all its wordings."""
    return b"".join(np.asarray(field).tobytes() for field in labels(sentence))


def write_prompts(
    path: str | Path,
    n: int,
    split: str,
    seed: int,
    num_frames: int = 25,
    apart_from: str | Path | None = None,
) -> None:
    """Writes n different captions of `split`, one a line; the same arguments give the same file.

    apart_from: a list of prompts; none asks for what one of these asks for, in other words either.
    """
    rng = np.random.default_rng(seed)
    taken = set(map(said, prompts.read(apart_from))) if apart_from else set()
    lines: dict[str, None] = {}
    while len(lines) < n:
        drawn = captions(sample_attributes(rng, n, num_frames, split), rng)
        lines |= dict.fromkeys(line for line in drawn if said(line) not in taken)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("\n".join(list(lines)[:n]) + "\n")


if __name__ == "__main__":
    # python -m linvideo_jax.data.captions assets: the shipped prompt lists.
    parser = argparse.ArgumentParser(description="Write the shipped lists of prompts.")
    parser.add_argument("folder")
    folder = Path(parser.parse_args().folder)
    write_prompts(folder / "prompts_digits_train.txt", 1000, "train", seed=1)
    write_prompts(folder / "prompts_digits_test.txt", 256, "test", seed=2)
    # Settings are chosen on these, tables are made on the ones above.
    test = folder / "prompts_digits_test.txt"
    validation = folder / "prompts_digits_validation.txt"
    write_prompts(validation, 128, "test", seed=3, apart_from=test)
    write_prompts(folder / "prompts_digits_test_81.txt", 256, "test", seed=2, num_frames=81)
