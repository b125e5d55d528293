"""What every program shares: --help, wrong input as one sentence, and exit codes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from kernels.softmax_attention import interface
from linvideo_jax.errors import UserError


def define(strings: Mapping[str, tuple[str | None, str]]) -> flags.FlagValues:
    """A fresh set of flags: --help, and a string flag for each name with its (default, help)."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_bool("help", False, "show this and stop", flag_values=values)
    for name, (default, text) in strings.items():
        flags.DEFINE_string(name, default, text, flag_values=values)
    return values


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str | None) -> dict[str, Any]:
    """Reads a command line (program name first) into `values`, and returns them by name.

    With --help prints `usage` and the flags, and raises SystemExit(0). UserError for an unknown
    flag, a value of the wrong type, or a word that belongs to no flag.
    """
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; --help lists the flags.") from None
    if values.help:
        print(usage, values.get_help(), sep="\n")
        raise SystemExit(0)
    if rest:
        raise UserError(
            f"{rest[0]!r} is not a flag: quote a value with spaces; --help lists the flags."
        )
    return values.flag_values_dict()


def integers(given: Mapping[str, Any], *names: str) -> dict[str, int]:
    """These flags as whole numbers; UserError for what is none."""
    try:
        return {name: int(given[name]) for name in names}
    except ValueError as error:
        raise UserError(f"a number is needed ({error}): --help lists the flags.") from None


def required(given: Mapping[str, Any], *names: str) -> None:
    """UserError for the first of the flags that is not given."""
    for name in names:
        if not given[name]:
            raise UserError(f"--{name} is missing; --help says what it is.")


def choice(name: str, value: str | None, choices: Sequence[str]) -> str | None:
    """The value, if it is one of the choices or None; else UserError."""
    if value is not None and value not in choices:
        raise UserError(f"--{name}={value} is unknown; choose from {', '.join(choices)}.")
    return value


def run(program: Callable[[Sequence[str]], None], argv: Sequence[str], how_to_go_on: str) -> int:
    """Runs `program(argv)` (program name first) and returns its exit code, without a traceback.

    0; 2 for a UserError; 130 for Ctrl-C or SIGTERM, with `how_to_go_on` on standard error; else the
    code of the program's SystemExit, such as 1 for a --plan that does not fit. A host that lost the
    others ends its process with 3, past this function. Names in the environment variable
    SOFTMAX_ATTENTION that are unknown, or do not serve, are a UserError too.
    """
    try:
        with _named_attention(), _sigterm_as_interrupt():
            program(argv)
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        where = f"{interrupt}; " if str(interrupt) else ""
        print(f"interrupted: {where}{how_to_go_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`: who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code or 0
    return 0


@contextlib.contextmanager
def _named_attention() -> Iterator[None]:
    given = os.environ.get(interface.VARIABLE, "")
    names = given.split(",") if given else []
    for name in names:
        if name not in interface.IMPLEMENTATIONS:
            raise UserError(
                f"{interface.VARIABLE}={given} names no {name!r} that is known: choose from "
                f"{', '.join(interface.IMPLEMENTATIONS)}, or unset it."
            )
    try:
        yield
    except NotImplementedError as error:
        refusals = " ".join(str(error).split())
        if not names or not refusals.startswith(f"{names[0]}: "):  # not `dispatch`'s
            raise
        raise UserError(
            f"{interface.VARIABLE}={given} does not serve ({refusals}): name another one, "
            "or unset it."
        ) from None


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
