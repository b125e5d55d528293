"""Configuration files of train.py, and their fields on the command line."""

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from linvideo_jax.errors import UserError
from linvideo_jax.parts import DTYPES

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
_WORDS = re.compile(r"[\w.+-]+(, *[\w.+-]+)*")
_ILLEGAL = re.compile(r"flag --config\.([^=]*)=(.*?): ", re.DOTALL)


def load(path: str) -> ConfigDict:
    """What `get_config()` of a Python file returns; UserError if that is no ConfigDict."""
    if not Path(path).is_file():
        raise UserError(f"the configuration {path} does not exist: --config names a Python file.")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None:
        raise UserError(f"the configuration {path} is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a file may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the configuration {path} cannot be loaded ({reason}): mend it.") from None
    if not isinstance(config, ConfigDict) or "stages" not in config:
        raise UserError(
            f"get_config() of {path} must return a ConfigDict with a field `stages`: mend it."
        )
    return config


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without its `--config.FIELD=value`, and these."""
    overrides = [word for word in argv if _OVERRIDE.match(word)]
    return [word for word in argv if not _OVERRIDE.match(word)], overrides


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The locked configuration with every `--config.FIELD=value` put in.

    UserError for an unknown field, which names the nearest known one, for a value that is not of
    the field's type, and for an unknown dtype.
    """
    known = [name for name, _ in _fields(config)]
    for match in map(_OVERRIDE.match, overrides):
        _check_known(match[1], known)
    default = config.copy_and_resolve_references()
    argv = ["", *(_with_tuple(word, default) for word in overrides)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except flags.Error as error:
        if match := _ILLEGAL.match(str(error)):
            raise _wrong_type(match[1], match[2], default) from None
        raise UserError(f"{' '.join(str(error).split())}; write --config.FIELD=value.") from None
    config = values.config
    for name, value in _fields(config):
        before = _get(default, name)
        if isinstance(before, tuple) and before and not _same_kinds(value, before):
            raise _wrong_type(name, value, default)
        _check_dtype(name, value)
    return config


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy with other values in some fields, {"transfer.target": 3}; UserError as `override`."""
    default, config = config, config.copy_and_resolve_references()
    known = [name for name, _ in _fields(config)]
    for name, value in changes.items():
        _check_known(name, known)
        *groups, last = name.split(".")
        group = _get(config, ".".join(groups)) if groups else config
        try:
            if isinstance(group[last], ConfigDict):
                value = ConfigDict(value)
            group[last] = value
        except (TypeError, ValueError):
            raise _wrong_type(name, value, default) from None
        _check_dtype(name, value)
    return config


def _check_dtype(name: str, value: Any) -> None:
    if name.split(".")[-1] == "dtype" and value not in DTYPES:
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(DTYPES)}.")


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        nearest = max(known, key=lambda other: _similarity(name, other))
        raise UserError(
            f"the configuration has no field {name}; the nearest that it has is {nearest}."
        )


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in config:
        yield prefix + key, config[key]
        if isinstance(config[key], ConfigDict):
            yield from _fields(config[key], f"{prefix}{key}.")


def _with_tuple(word: str, config: ConfigDict) -> str:
    """The override as it is, but a tuple's words without quotes, a,b.c, as ('a', 'b.c')."""
    field, value = _OVERRIDE.match(word)[1], word.partition("=")[2]
    if isinstance(_get(config, field), tuple) and _WORDS.fullmatch(value):
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return f"--config.{field}={tuple(re.split(', *', value))!r}"
    return word


def _get(config: ConfigDict, name: str) -> Any:
    for key in name.split("."):
        config = config[key]
    return config


def _similarity(wrong: str, name: str) -> float:
    whole = difflib.SequenceMatcher(None, wrong, name).ratio()
    return whole + difflib.SequenceMatcher(None, wrong.split(".")[-1], name.split(".")[-1]).ratio()


def _same_kinds(value: Any, before: tuple) -> bool:
    kinds = {type(element) for element in before}
    kinds |= {int} if float in kinds else set()
    return all(type(element) in kinds for element in value)


def _wrong_type(name: str, value: Any, config: ConfigDict) -> UserError:
    before = _get(config, name)
    kind = "group" if isinstance(before, ConfigDict) else type(before).__name__
    example = "" if isinstance(before, ConfigDict) else f", such as {before!r}"
    return UserError(f"config.{name} cannot be {value}: its type is {kind}{example}.")
