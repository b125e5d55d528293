"""Finds the tiles of the GPU kernels of linear attention, and stores them where they are read.

python benchmarks/tune_kernels.py

Times every candidate of each of the five kernels on this machine's GPU, at Wan2.1's two sizes, in
bfloat16 unless --dtype says otherwise, and writes the best to --store, by default the file in
kernels/linear_attention that gpu_tiles.choose reads. It is written after each kernel; an
interrupted run may be started again with --layers for the sizes that are left.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import timing

from kernels.gpu import GPU, target
from kernels.linear_attention import FeatureMap, gpu_tiles, pallas_gpu
from kernels.linear_attention.gpu_tiles import KERNELS, Layer, TileConfig, Tiles
from linvideo_jax import command_line
from linvideo_jax.errors import UserError

LAYERS = {"1.3B": (32_760, 12, 128), "14B": (75_600, 40, 128), "digits": (2304, 48, 32)}
ROUNDS = 5


def candidates(gpu: GPU, layer: Layer, kernel: str) -> Iterator[Tiles]:
    """Tiles that fit the chip, two programs of 4 warps a multiprocessor or one of 8."""
    default = getattr(gpu_tiles.default(gpu, layer), kernel)
    yield default
    sizes = (16, 32) if layer.dtype == "float32" else (32, 64, 128)
    for tokens, warps, stages in itertools.product(sizes, (4, 8), (1, 2, 3)):
        tiles = Tiles(tokens, 8 // warps * gpu.cores, warps, stages)
        fits = gpu_tiles.shared_memory(kernel, tiles, gpu, layer) <= gpu.shared_memory
        if fits and tiles != default:
            yield tiles


def subject(kernel: str, config: TileConfig, inputs: Any) -> tuple[Callable[..., Any], Any]:
    """A function that runs the kernel and little else, and its arguments."""
    q, k, v, maps, cotangent, state = inputs
    if kernel == "state":
        return (lambda k, v: pallas_gpu.linear_attention_state(k, v, maps, None, config)), (k, v)
    if kernel == "apply":
        return (lambda q, state: pallas_gpu.apply_state(q, state, maps, config)), (q, state)

    # The forward kernel's result is not used, so XLA leaves it out.
    if kernel == "state_backward":

        def run(k, v, cotangent):
            function = lambda k, v, maps: pallas_gpu.linear_attention_state(  # noqa: E731
                k, v, maps, None, config
            )
            return jax.vjp(function, k, v, maps)[1](cotangent)

        return run, (k, v, state)

    def run(q, state, cotangent):
        function = lambda q, state, maps: pallas_gpu.apply_state(q, state, maps, config)  # noqa: E731
        return jax.vjp(function, q, state, maps)[1](cotangent)

    return run, (q, state, cotangent)


def best(
    kernel: str, gpu: GPU, layer: Layer, config: TileConfig, inputs: Any
) -> tuple[Tiles, float]:
    """The candidate with the least median, and its milliseconds.

    query_backward and apply_backward are timed together.
    """
    timed = {}

    def build(tiles: Tiles):
        function, args = subject(kernel, replace(config, **{kernel: tiles}), inputs)
        try:
            return jax.jit(function).lower(*args).compile(), args
        except jax.errors.JaxRuntimeError as error:  # too much shared memory after all
            return str(error).splitlines()[0][:100]

    def measure(tried: Sequence[Tiles]) -> None:
        # Compiling takes seconds of one core, so all at once; timing one after the other.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(build, tried))
        for tiles, program in zip(tried, built, strict=True):
            if isinstance(program, str):
                print(f"    {tiles}: {program}", flush=True)
                continue
            compiled, args = program
            calls = timing.warm(compiled, *args)
            samples = [timing.seconds(compiled, args, calls) for _ in range(ROUNDS)]
            timed[tiles] = timing.summary(samples)["ms"]
            print(f"    {tiles}: {timed[tiles]:.4f} ms", flush=True)

    measure(list(candidates(gpu, layer, kernel)))
    if not timed:
        raise UserError(f"no candidate of {kernel} compiled.")
    fastest = min(timed, key=timed.get)
    others = [replace(fastest, programs=n * gpu.cores) for n in (1, 2, 3, 4, 8)]
    measure([tiles for tiles in others if tiles not in timed])
    fastest = min(timed, key=timed.get)
    return fastest, timed[fastest]


def tune(name: str, dtype: str, store: Path) -> None:
    tokens, heads, head_dim = LAYERS[name]
    gpu = target()
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (1, tokens, heads, head_dim)
    q, k, v, cotangent = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys[:4])
    weights = (
        jax.random.normal(key, (heads, head_dim, head_dim // 2)) / head_dim**0.5 for key in keys[4:]
    )
    maps = FeatureMap(*weights)
    layer = Layer.of(q, head_dim // 2)
    config = gpu_tiles.choose(gpu, layer)
    state = pallas_gpu.linear_attention_state(k, v, maps, None, config)
    inputs = (q, k, v, maps, cotangent, state)
    times = {}
    for kernel in KERNELS:
        print(f"  {name}, {kernel}", flush=True)
        if getattr(config, kernel) is None:
            print("    the reference serves: no tile fits", flush=True)
            continue
        tiles, times[kernel] = best(kernel, gpu, layer, config, inputs)
        config = replace(config, **{kernel: tiles})
        entry = gpu_tiles.entry(gpu, layer, config) | {"ms": times, "jax": jax.__version__}
        timing.keep(entry, store, ("device", *Layer._fields))
        print(f"    best {asdict(tiles)}", flush=True)


def program(argv: Sequence[str]) -> None:
    values = command_line.define(
        {
            "store": (str(gpu_tiles.STORED), "file of the tiles"),
            "layers": ("1.3B,14B", f"sizes, of {', '.join(LAYERS)}"),
            "dtype": ("bfloat16", "bfloat16, float16 or float32"),
        }
    )
    given = command_line.parse(values, argv, __doc__)
    command_line.choice("dtype", given["dtype"], ("bfloat16", "float16", "float32"))
    names = given["layers"].split(",")
    for name in names:
        command_line.choice("layers", name, list(LAYERS))
    if jax.default_backend() != "gpu":
        raise UserError(f"it needs an NVIDIA GPU; this is {jax.default_backend()}.")
    for name in names:
        tune(name, given["dtype"], Path(given["store"]))


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the tiles found so far are stored")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
