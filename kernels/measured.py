"""Settings of kernels that were measured on a device and stored in JSON files, one a layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kernels.gpu import GPU


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file; none without it."""
    return json.loads(path.read_text()) if path.exists() else []


def alike(
    entries: Iterable[dict[str, Any]], gpu: GPU, layer: Any, same: Sequence[str]
) -> list[dict[str, Any]]:
    """Those of this chip that have the layer's values in the fields `same`."""
    return [
        entry
        for entry in entries
        if entry["device"] == gpu.kind and all(entry[x] == getattr(layer, x) for x in same)
    ]


def distance(entry: dict[str, Any], layer: Any, *names: str) -> float:
    """How many doublings lie between an entry and a layer, over these sizes together."""
    return sum(abs(math.log2(entry[name] / getattr(layer, name))) for name in names)
