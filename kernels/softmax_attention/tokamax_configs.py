"""How tokamax's Hopper kernel is divided: a measured configuration where there is one."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kernels.gpu import GPU

if TYPE_CHECKING:
    import jax

# Written by benchmarks/tune_softmax.py: a list of {device, dtype, head_dim, heads, tokens, keys,
# config, ms, tokamax}, where heads counts those of the whole batch and config has the fields of
# tokamax's own.
STORED = Path(__file__).with_name("tokamax_configs.json")


class Layer(NamedTuple):
    """What the best configuration depends on; heads counts those of the whole batch."""

    dtype: str
    head_dim: int
    heads: int
    tokens: int
    keys: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array) -> Layer:
        batch, tokens, heads, head_dim = q.shape
        return cls(str(q.dtype), head_dim, batch * heads, tokens, k.shape[1])


def choose(gpu: GPU, layer: Layer) -> dict[str, Any] | None:
    """The stored fields nearest in keys, tokens and heads, for this chip, dtype and head_dim.

    None where the nearest has four times as many keys or more, or as few: tokamax's heuristic
    decides then.
    """

    def distance(entry, name):
        return abs(math.log2(entry[name] / getattr(layer, name)))

    entries = [
        entry
        for entry in stored()
        if entry["device"] == gpu.kind
        and all(entry[name] == getattr(layer, name) for name in ("dtype", "head_dim"))
        and distance(entry, "keys") < 2
    ]
    if not entries:
        return None
    nearest = min(entries, key=lambda x: sum(distance(x, n) for n in ("keys", "tokens", "heads")))
    config = nearest["config"]
    # Without this many blocks of keys the stages of a program could not be filled.
    fits = config["num_stages"] <= -(-layer.keys // config["block_kv"])
    return config if fits else None


@functools.cache
def stored() -> list[dict[str, Any]]:
    return json.loads(STORED.read_text()) if STORED.exists() else []
