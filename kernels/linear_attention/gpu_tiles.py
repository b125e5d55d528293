"""Which tiles the GPU kernels use: measured ones where there are some, else a default."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import measured
from kernels.gpu import GPU

# Written by benchmarks/tune_kernels.py: a list of {device, capability, dtype, head_dim,
# features, heads, tokens, tiles}, where heads counts those of the whole batch.
STORED = Path(__file__).with_name("gpu_tiles.json")
KERNELS = ("state", "apply", "query_backward", "apply_backward", "state_backward")


@dataclass(frozen=True)
class Tiles:
    """How one kernel is divided.

    tokens: of a tile, a power of two from 16 on.
    programs: about how many to start; each takes one head and a span of tiles.
    num_warps, num_stages: of a program, and in how many stages its loads run ahead.
    """

    tokens: int
    programs: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        if self.tokens < 16 or self.tokens & (self.tokens - 1):
            raise ValueError(f"tile of {self.tokens} tokens: needs a power of two from 16 on")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.num_warps} warps: needs 1, 2, 4, 8 or 16")
        if self.programs < 1 or self.num_stages < 1:
            raise ValueError(f"{self.programs} programs, {self.num_stages} stages: needs one each")


@dataclass(frozen=True)
class TileConfig:
    """Tiles of each kernel.

    None where no tile fits the chip's shared memory: for a backward kernel the reference then
    computes that gradient; without tiles for a forward kernel the inputs are refused.
    """

    state: Tiles | None
    apply: Tiles | None
    query_backward: Tiles | None
    apply_backward: Tiles | None
    state_backward: Tiles | None


class Layer(NamedTuple):
    """What the best tiles depend on; heads counts those of the whole batch."""

    dtype: str
    head_dim: int
    features: int
    heads: int
    tokens: int

    @classmethod
    def of(cls, x: jax.Array, features: int) -> Layer:
        batch, tokens, heads, head_dim = x.shape
        return cls(str(x.dtype), head_dim, features, batch * heads, tokens)


def choose(gpu: GPU, layer: Layer) -> TileConfig:
    """The stored tiles nearest in heads and tokens, of this chip or its relatives, or a default."""
    entries = measured.alike(stored(), gpu, layer, ("dtype", "head_dim", "features"))
    config = default(gpu, layer)
    if not entries:
        return config
    nearest = min(entries, key=lambda x: measured.distance(x, layer, "heads", "tokens"))
    tiles = nearest["tiles"]
    return replace(config, **{kernel: Tiles(**tiles[kernel]) for kernel in tiles})


def default(gpu: GPU, layer: Layer) -> TileConfig:
    """What compiles without spilling many registers, by ptxas' report; not timed on any chip."""
    if layer.dtype == "float32":
        first = second = Tiles(16, 2 * gpu.cores, 4, 1)
    elif gpu.capability != 9.0:
        first = second = Tiles(32, 2 * gpu.cores, 4, 2)
    elif layer.head_dim < 128:
        first = second = Tiles(4096 // layer.head_dim, 2 * gpu.cores, 4, 3)
    else:
        # Two programs of 4 warps, or one of 8 where the registers of 4 would not do.
        first, second = Tiles(64, 2 * gpu.cores, 4, 2), Tiles(128, gpu.cores, 8, 2)
    wanted = {"query_backward": second, "state_backward": second}
    return TileConfig(
        **{kernel: fitting(kernel, wanted.get(kernel, first), gpu, layer) for kernel in KERNELS}
    )


def fitting(kernel: str, tiles: Tiles, gpu: GPU, layer: Layer) -> Tiles | None:
    """The tiles with fewer stages, then fewer tokens, until the kernel fits the chip; or None."""
    while shared_memory(kernel, tiles, gpu, layer) > gpu.shared_memory:
        if tiles.num_stages > 1:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.tokens > 16:
            tiles = replace(tiles, tokens=tiles.tokens // 2)
        else:
            return None
    return tiles


def shared_memory(kernel: str, tiles: Tiles, gpu: GPU, layer: Layer) -> int:
    """Bytes of a program at most: operands of products, tiles in flight, and conversions.

    Fitted to what Triton reports; benchmarks/kernels_gpu.py compares.
    """
    size = jnp.dtype(layer.dtype).itemsize
    features = padded_features(layer.features)
    tile, phi = tiles.tokens * layer.head_dim * size, tiles.tokens * features * size
    weight = layer.head_dim * features * size
    halves = 2 * weight
    arrays = 1 if kernel == "apply" else 2
    total = weight + tiles.num_stages * arrays * tile
    if kernel in ("state", "apply_backward"):
        total += 2 * phi + tiles.tokens * (16 * size + 8 * tiles.num_stages)
    elif kernel == "apply":
        total += halves + tile
    else:
        total += halves + phi + tile
        if size == 2 and gpu.capability < 9.0:  # operands lie both ways round
            total += weight if kernel == "query_backward" else weight + halves
    if layer.dtype == "float16" and "backward" in kernel:  # and rounded to bfloat16
        total += weight + arrays * tile
    return total


def padded_features(features: int) -> int:
    """Features as the kernels see them: a power of two, 16 at least."""
    return max(16, 1 << (features - 1).bit_length())


@functools.cache
def stored() -> list[dict[str, Any]]:
    return measured.read(STORED)


def entry(gpu: GPU, layer: Layer, config: TileConfig) -> dict[str, Any]:
    """What `choose` reads back."""
    tiles = {kernel: asdict(one) for kernel in KERNELS if (one := getattr(config, kernel))}
    return measured.entry(gpu, layer, tiles=tiles)
