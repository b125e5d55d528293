"""Timing on one device, and keeping what is best: shared by the benchmarks of kernels."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from linvideo_jax.loop import read_json, write_json


def warm(function: Callable[..., Any], *args: Any) -> int:
    """Compiles, and says how many calls make at least 20 ms."""
    jax.block_until_ready(function(*args))
    return max(1, min(200, round(0.02 / max(1e-6, seconds(function, args, 3)))))


def seconds(function: Callable[..., Any], args: Any, calls: int) -> float:
    """Of one call among several that are queued together, so that the host's part is hidden."""
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def summary(samples: list[float]) -> dict[str, Any]:
    """Milliseconds: median, and the quartiles as its spread."""
    samples = sorted(1e3 * x for x in samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"ms": statistics.median(samples), "quartiles": [low, high], "samples": len(samples)}


def copy_bandwidth(mebibytes: int) -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = jax.random.normal(jax.random.key(0), (mebibytes * 2**19,), jnp.bfloat16)
    copy = jax.jit(lambda x: x * 2)
    calls = warm(copy, x)
    best = min(seconds(copy, (x,), calls) for _ in range(5))
    return 2 * x.nbytes / best


def device() -> dict[str, str]:
    """What a figure belongs to."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def keep(entry: Mapping[str, Any], store: Path, same: Sequence[str]) -> None:
    """Puts an entry into a JSON file of them, instead of one that has the same in these fields."""
    others = read_json(store) if store.exists() else []
    write_json(store, [*(x for x in others if any(x[key] != entry[key] for key in same)), entry])
