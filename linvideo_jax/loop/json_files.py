"""JSON files that are written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no half-written file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError if it is not one, or not there."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a file that does.") from None
    except (OSError, ValueError) as error:  # a picture is no UTF-8, a ValueError too
        raise UserError(
            f"{path} cannot be read as JSON ({error}): delete it and run again."
        ) from None
