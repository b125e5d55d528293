"""Finds how tokamax's Hopper kernel is best divided at Wan2.1's sizes, and stores it.

python benchmarks/tune_softmax.py

Times every candidate on this machine's GPU, which must be a Hopper, forward alone, in bfloat16
unless --dtype says otherwise, and writes the best to --store, by default the file in
kernels/softmax_attention that tokamax_configs.choose reads. It is written after each size; a size
that is as another one but longer tries that one's best alone.
"""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp

from benchmarks import timing
from kernels import measured
from kernels.gpu import target
from kernels.softmax_attention import tokamax_configs, tokamax_mosaic
from kernels.softmax_attention.tokamax_configs import Layer
from linvideo_jax import command_line
from linvideo_jax.errors import UserError

# Batch, tokens, heads, keys.
LAYERS = {
    "1.3B": (1, 32_760, 12, 32_760),
    "1.3B-text": (1, 32_760, 12, 512),
    "1.3B-guided": (2, 32_760, 12, 32_760),
    "14B": (1, 75_600, 40, 75_600),
    "14B-text": (1, 75_600, 40, 512),
}
LIKE = {"1.3B-guided": "1.3B", "14B": "1.3B", "14B-text": "1.3B-text"}
HEAD_DIM = 128
# What tokamax 0.0.17 takes by itself.
HEURISTIC = {"block_q": 64, "block_kv": 128, "num_stages": 2, "persistent": True}
FINALISTS, ROUNDS = 4, 5
WRONG = 0.01  # relative error, of one candidate against another


def candidates() -> list[dict[str, Any]]:
    """What fits the shared memory, two groups of block_q queries a program; tokamax's own first.

    tokamax's search leaves 192 keys out.
    """
    found = [HEURISTIC]
    for values in itertools.product((64, 128), (64, 128, 192), (2, 3, 4), (False, True)):
        config = dict(zip(HEURISTIC, values, strict=True))
        block_q, block_kv, num_stages, persistent = values
        shared = (2 * block_q + num_stages * 2 * block_kv) * HEAD_DIM * 2 + 32 * 1024 * persistent
        if shared < target().shared_memory and config != HEURISTIC:
            found.append(config)
    return found


def inputs(name: str, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random q, k, v of a size of LAYERS."""
    batch, tokens, heads, keys = LAYERS[name]
    shapes = [(batch, length, heads, HEAD_DIM) for length in (tokens, keys, keys)]
    drawn = zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    return tuple(jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in drawn)


def ranked(
    tried: Sequence[Mapping[str, Any]], arrays: tuple[jax.Array, ...]
) -> list[tuple[float, Mapping[str, Any]]]:
    """(milliseconds, configuration), the fastest first, of the best few and the first of `tried`.

    All are timed once, and those few then in turns, so that a chip that grows slower slows all of
    them. One whose values differ from the first's is left out.
    """

    def build(config: Mapping[str, Any]):
        def run(q, k, v):
            kernel = tokamax_mosaic.configured(q, k, v, config)
            if kernel is None:
                raise UserError("this version of tokamax has no such kernel or fields.")
            return kernel(q, k, v)

        try:
            return jax.jit(run).lower(*arrays).compile()
        except Exception as error:  # the kernel's own compiler has many kinds
            return f"{type(error).__name__}: {error}".splitlines()[0][:100]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(build, tried))
    calls, first = {}, {}
    for i, program in enumerate(built):
        if isinstance(program, str):
            print(f"    {tried[i]}: {program}", flush=True)
            continue
        calls[i] = min(8, timing.warm(program, *arrays))
        first[i] = timing.seconds(program, arrays, calls[i])
        print(f"    {tried[i]}: {1e3 * first[i]:.3f} ms", flush=True)
    if 0 not in first:
        raise UserError("tokamax's own configuration does not compile.")
    best = [i for i in sorted(first, key=first.get) if i][:FINALISTS]
    wanted = built[0](*arrays)
    right = [0, *(i for i in best if _error(built[i](*arrays), wanted) < WRONG)]
    for i in set(best) - set(right):
        print(f"    {tried[i]}: its values are wrong", flush=True)
    samples: dict[int, list[float]] = {i: [] for i in right}
    for _ in range(ROUNDS):
        for i in right:
            samples[i].append(timing.seconds(built[i], arrays, calls[i]))
    found = sorted((timing.summary(samples[i])["ms"], i) for i in right)
    return [(ms, tried[i]) for ms, i in found]


@jax.jit
def _error(ours, wanted):
    wanted = wanted.astype(jnp.float32)
    difference = ours.astype(jnp.float32) - wanted
    return jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(wanted.ravel())


def entry(name: str, dtype: str, ms: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokamax_configs.choose` reads back."""
    batch, tokens, heads, keys = LAYERS[name]
    layer = Layer(dtype, HEAD_DIM, batch * heads, tokens, keys)
    versions = {"tokamax": version("tokamax"), "jax": jax.__version__}
    return measured.entry(target(), layer, config=dict(config), ms=ms, **versions)


def tune(names: Sequence[str], dtype: str, store: Path) -> None:
    found: dict[str, list] = {}
    for name in names:
        batch, tokens, heads, keys = LAYERS[name]
        like = found.get(LIKE.get(name, ""))
        others = [config for _, config in like if config != HEURISTIC] if like else []
        tried = [HEURISTIC, *others] if like else candidates()
        print(f"  {name}: {len(tried)} candidates", flush=True)
        found[name] = ranked(tried, inputs(name, dtype))
        operations = 4 * batch * heads * HEAD_DIM * tokens * keys
        for ms, config in found[name]:
            speed = operations / ms * 1e-9
            print(f"  {name}: {ms:.3f} ms, {speed:.0f} TFLOP/s: {config}", flush=True)
        timing.keep(entry(name, dtype, *found[name][0]), store, ("device", *Layer._fields))


def program(argv: Sequence[str]) -> None:
    values = command_line.define(
        {
            "store": (str(tokamax_configs.STORED), "file of the configurations"),
            "layers": (",".join(LAYERS), "sizes"),
            "dtype": ("bfloat16", "bfloat16 or float16"),
        }
    )
    given = command_line.parse(values, argv, __doc__)
    command_line.choice("dtype", given["dtype"], ("bfloat16", "float16"))
    names = given["layers"].split(",")
    for name in names:
        command_line.choice("layers", name, list(LAYERS))
    try:
        tokamax_mosaic.check(jnp.zeros((1, 1, 1, HEAD_DIM), given["dtype"]), None)
    except NotImplementedError as refusal:
        raise UserError(f"tokamax's kernel {refusal}.") from refusal
    tune(names, given["dtype"], Path(given["store"]))


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the configurations found so far are stored")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
