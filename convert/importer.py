"""Reads the parameters of a checkpoint of PyTorch's world under our names, one at a time."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from convert.keys import ALIASES, Entry, torch_entries
from convert.lora import Change, Lora
from convert.sources import PartSource, Source
from convert.tensors import DTYPES, Tensors
from linvideo_jax import lazy
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray
from linvideo_jax.parts import FEATURE_MAP, Flat, flat_shapes


def read(
    source: Source, parts: Iterable[str] | None = None, loras: Sequence[Lora] = ()
) -> dict[str, Flat]:
    """Every parameter of the parts, by flat name, lazily, in the dtype in which it is stored.

    Feature maps only of the linear layers; loras are merged into the transformer. Raises one
    UserError with every key that is unknown, missing, given twice, of the wrong shape or of a dtype
    that is not read, before reading any.
    """
    flat, problems = {}, []
    for part in parts or source.parts:
        here = source.parts[part]
        try:
            entries = torch_entries(part, flat_shapes(part, here.model))
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{source.path}: the {part}'s configuration has values of the wrong kind ({error})."
            ) from error
        maps = {key: entry for key, entry in entries.items() if FEATURE_MAP in key}
        plain = {key: entry for key, entry in entries.items() if key not in maps}
        changes: dict[str, Change] = {}
        if part == "transformer":
            shapes = {key: entry.shape for key, entry in plain.items()}
            for lora in loras:
                changes = _composed(changes, lora.changes(shapes))
        flat[part] = {}
        sources = [(plain, here)]
        if part == "transformer" and (files := source.feature_maps):
            linear = {str(layer) for layer in source.config["linear_layers"]}
            maps = {key: entry for key, entry in maps.items() if key.split(".")[1] in linear}
            sources.append((maps, PartSource(None, files, {key: key for key in files.shapes})))
        for wanted, where in sources:
            located, found = _compare(wanted, where)
            if found:
                problems.append(f"{where.files.where}:\n" + "\n".join(found))
                continue
            for key, entry in located.items():
                change = changes.get(where.names[key])
                flat[part][entry.ours] = _lazy(where.files, key, entry, change)
    if problems:
        raise UserError(
            f"{source.path} does not fit its configuration; nothing was written.\n"
            + "\n".join(problems)
        )
    return flat


def _composed(first: dict[str, Change], second: dict[str, Change]) -> dict[str, Change]:
    def both(one: Change, two: Change) -> Change:
        return lambda weight: two(one(weight))

    joined = {key: both(first[key], second[key]) for key in first.keys() & second.keys()}
    return {**first, **second, **joined}


def _lazy(files: Tensors, key: str, entry: Entry, change: Change | None) -> LazyArray:
    dtype = DTYPES[files.dtypes[key]]
    # Zero strides: a shape to transform without its memory.
    shape = entry.transform.to_ours(np.broadcast_to(np.float32(0), entry.shape)).shape

    def read() -> np.ndarray:
        array = files.read(key)
        if change is not None:
            array = lazy.cast(change(array.astype(np.float32)), dtype)
        return entry.transform.to_ours(array)

    return LazyArray(shape, dtype, read)


def _compare(wanted: dict[str, Entry], source: PartSource) -> tuple[dict[str, Entry], list[str]]:
    """The entries under the keys that the files use, and what is wrong, one line a kind."""
    files, present = source.files, set(source.names.values())
    located, taken = {}, {}
    unknown, unequal, twice = [], [], list(files.duplicates)
    shape, dtype = defaultdict(list), defaultdict(list)
    for key, diffusers in source.names.items():
        name = ALIASES[diffusers] if ALIASES.get(diffusers) in wanted else diffusers
        if name not in wanted:
            unknown.append(key)
            continue
        is_alias = name != diffusers and name in present
        if not is_alias and name in taken:
            twice.append(f"{taken[name]} as {key}")
            continue
        if not is_alias:
            located[key], taken[name] = wanted[name], key
        if files.shapes[key] != wanted[name].shape:
            shape[files.shapes[key], wanted[name].shape].append(key)
        elif files.dtypes[key] not in DTYPES:
            dtype[files.dtypes[key]].append(key)
        elif is_alias:
            first = next(k for k, other in source.names.items() if other == name)
            if files.shapes[first] == files.shapes[key] and not _same(files, first, key):
                unequal.append(f"{key} and {first}")
    missing = set(wanted) - {ALIASES.get(name, name) for name in present} - present
    lines = []
    if unknown:
        lines.append(f"  unknown: {grouped(unknown)}")
    if missing:
        lines.append(f"  missing: {grouped(missing)}")
    for (has, needs), keys in shape.items():
        lines.append(f"  wrong shape {list(has)} instead of {list(needs)}: {grouped(keys)}")
    for name, keys in dtype.items():
        lines.append(f"  dtype {name}, not one of {', '.join(DTYPES)}: {grouped(keys)}")
    if unequal:
        lines.append(f"  differ, but must be one array: {', '.join(unequal)}")
    if twice:
        lines.append(f"  given twice: {grouped(twice)}")
    return located, lines


def _same(files: Tensors, key: str, other: str) -> bool:
    """Whether two arrays are equal, looking at a thousand rows at a time."""
    a, b = files.read(key), files.read(other)
    rows = range(0, len(a), 1000)
    return all(np.array_equal(a[row : row + 1000], b[row : row + 1000]) for row in rows)


def grouped(keys: Iterable[str]) -> str:
    """Keys in one line; of those that differ in their first number alone a range: `a.{0-3,5}.b`."""
    groups = defaultdict(list)
    for key in keys:
        numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", key)
        head, number, tail = numbered.groups() if numbered else (key, None, "")
        groups[head, tail].append(number if number is None else int(number))
    texts = []
    for (head, tail), numbers in sorted(groups.items()):
        texts.append(head + ("" if numbers == [None] else _ranges(sorted(numbers))) + tail)
    return ", ".join(texts)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"
