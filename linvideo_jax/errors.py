"""The one exception that a user's input may cause; `command_line.run` shows it."""


class UserError(Exception):
    """Wrong input: one sentence that says what is wrong and what to do."""
