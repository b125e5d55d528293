"""The one exception that a user's input may cause; `command_line.run` shows it."""

from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong and what to do."""


def check_counts(group: str, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """UserError for the first of these fields of a configuration's group that is below 1."""
    for name in names:
        if settings[name] < 1:
            raise UserError(f"{group}.{name} is {settings[name]}: choose 1 or more.")


def check_accumulate(group: str, settings: Mapping[str, Any]) -> None:
    """UserError for parts of a batch (`accumulate`, 1 or more) that do not divide it."""
    if settings["batch_size"] % settings["accumulate"]:
        raise UserError(
            f"{group}.accumulate is {settings['accumulate']}: choose a divisor of "
            f"{group}.batch_size, {settings['batch_size']}."
        )
