"""Flags and exit codes of the two converters."""

import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from linvideo_jax.errors import UserError, run_program

Flag = tuple[str | None, str]  # default, help


def parse(
    argv: Sequence[str], names: Mapping[str, Flag], usage: str | None
) -> dict[str, str | None]:
    """String flags of a command line (program name first); with --help, prints `usage` and exits.

    UserError for a flag that is unknown, or has no value and no default.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this and stop", flag_values=values)
    for name, (default, text) in names.items():
        flags.DEFINE_string(name, default, text, flag_values=values)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the flags.") from None
    if values.help:
        print(usage, values.get_help(), sep="\n")
        raise SystemExit(0)
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; --help lists the flags.")
    return {name: values[name].value for name in names}


def required(given: Mapping[str, str | None], *names: str) -> None:
    """UserError for the first of the flags that is not given."""
    for name in names:
        if not given[name]:
            raise UserError(f"--{name} is missing; --help says what it is.")


def choice(name: str, value: str | None, choices: Sequence[str]) -> str | None:
    """The value, if it is one of the choices or None; else UserError."""
    if value is not None and value not in choices:
        raise UserError(f"--{name}={value} is unknown; choose from {', '.join(choices)}.")
    return value


def run(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs `argv` (program name first); the exit code is 0, 2 for wrong input, 130 for Ctrl-C."""
    try:
        return run_program(program, argv)
    except KeyboardInterrupt:
        print("interrupted: nothing was written; give the same command again", file=sys.stderr)
        return 130
