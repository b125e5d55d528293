"""How tokamax's Hopper kernel is divided: a measured configuration where there is one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kernels import measured
from kernels.gpu import GPU

if TYPE_CHECKING:
    import jax

# Written by benchmarks/tune_softmax.py: a list of {device, capability, dtype, head_dim, heads,
# tokens, keys, config, ms, tokamax}, where heads counts those of the whole batch and config has the
# fields of tokamax's own.
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
    """The stored fields nearest in keys, tokens and heads, of this chip or its relatives.

    None where the nearest has four times as many keys or more, or as few: tokamax's heuristic
    decides then.
    """
    entries = [
        entry
        for entry in measured.alike(stored(), gpu, layer, ("dtype", "head_dim"))
        if measured.distance(entry, layer, "keys") < 2
    ]
    if not entries:
        return None
    sizes = ("keys", "tokens", "heads")
    nearest = min(entries, key=lambda x: measured.distance(x, layer, *sizes))
    config = nearest["config"]
    # Without this many blocks of keys the stages of a program could not be filled.
    fits = config["num_stages"] <= -(-layer.keys // config["block_kv"])
    return config if fits else None


@functools.cache
def stored() -> list[dict[str, Any]]:
    return measured.read(STORED)
