"""Lists of prompts: UTF-8 text files with one prompt a line."""

from pathlib import Path

from linvideo_jax.errors import UserError


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1; UserError without any."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text: convert it.") from None
    except OSError as error:
        raise UserError(
            f"the prompt file {path} cannot be read ({error.strerror}): name a text file with one "
            "prompt a line."
        ) from None
    if "\0" in text:
        raise UserError(
            f"the prompt file {path} is no text, but binary data: name a text file with one prompt "
            "a line."
        )
    numbered = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f"the prompt file {path} is empty: write one prompt a line into it.")
    return numbered


def read(path: str | Path) -> list[str]:
    """The lines of a prompt file that are not blank; UserError without any."""
    return [line for _, line in read_lines(path)]
