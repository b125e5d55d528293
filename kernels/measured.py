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
    """Those that have the layer's values in the fields `same`: this chip's, then its relatives'.

    An H200 multiplies as an H100 does, so that of two sizes the nearer tells more, whichever of the
    two it was measured on.
    """
    known = [x for x in entries if all(x[name] == getattr(layer, name) for name in same)]
    relatives = [x for x in known if x["capability"] == gpu.capability]
    return sorted(relatives, key=lambda x: x["device"] != gpu.kind)


def entry(gpu: GPU, layer: Any, **found: Any) -> dict[str, Any]:
    """An entry as `alike` reads it: the chip, the layer (a NamedTuple) and what was found."""
    return {"device": gpu.kind, "capability": gpu.capability, **layer._asdict(), **found}


def distance(entry: dict[str, Any], layer: Any, *names: str) -> float:
    """How many doublings lie between an entry and a layer, over these sizes together."""
    return sum(abs(math.log2(entry[name] / getattr(layer, name))) for name in names)
