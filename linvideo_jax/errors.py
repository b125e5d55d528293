"""The one exception that a user's input may cause, and how programs show it."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong and what to do."""


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs `program(argv)` and returns its exit code; a UserError becomes one line on stderr and 2."""
    try:
        program(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
