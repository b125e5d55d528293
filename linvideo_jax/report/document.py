"""What every page is made of."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from linvideo_jax.report.style import CSS


def document(title: str, sections: Sequence[str], head: str = "") -> str:
    """An HTML document that needs nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(name: str, heading: str, *parts: str) -> str:
    """One section; the parts are HTML."""
    return f'<section id="{name}"><h2>{heading}</h2>{"".join(parts)}</section>\n'


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """A few large figures, each with what it is."""
    found = "".join(
        f'<div class="fact"><b>{value}</b><span>{html.escape(what)}</span></div>'
        for value, what in facts
    )
    return f'<div class="facts">{found}</div>\n'


def values(config: Mapping[str, Any]) -> str:
    """A configuration, a line for each field."""
    return f"<pre>{html.escape(chr(10).join(_flat(config)))}</pre>"


def _flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value!r}"
