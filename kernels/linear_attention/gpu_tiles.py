"""Which tiles the GPU kernels use: measured ones where there are some, else a default."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclass(frozen=True)
class Tiles:
    """How one kernel is divided.

    tokens: of a tile, a power of two from 16 on.
    programs: about how many to start; each takes one head and a span of tiles.
    num_warps, num_stages: of a program, and how many tiles are being loaded at once.
    """

    tokens: int = 64
    programs: int = 264
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        if self.tokens < 16 or self.tokens & (self.tokens - 1):
            raise ValueError(f"tile of {self.tokens} tokens: needs a power of two from 16 on")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.num_warps} warps: needs 1, 2, 4, 8 or 16")
        if self.programs < 1 or self.num_stages < 1:
            raise ValueError(f"{self.programs} programs, {self.num_stages} stages: need one or more")


@dataclass(frozen=True)
class TileConfig:
    """Tiles of the five kernels."""

    state: Tiles = field(default_factory=Tiles)
    apply: Tiles = field(default_factory=Tiles)
    query_backward: Tiles = field(default_factory=Tiles)
    apply_backward: Tiles = field(default_factory=Tiles)
    state_backward: Tiles = field(default_factory=Tiles)


class GPU(NamedTuple):
    """What a kernel is compiled for."""

    kind: str
    capability: float
    cores: int  # streaming multiprocessors


H100 = GPU("NVIDIA H100 80GB HBM3", 9.0, 132)


def target() -> GPU:
    """The GPU of this machine; without one, for compilation ahead of time, an H100."""
    if jax.default_backend() != "gpu":
        return H100
    device = jax.devices()[0]
    try:
        capability = float(device.compute_capability)
    except ValueError:  # AMD's are names
        capability = 0.0
    return GPU(device.device_kind, capability, getattr(device, "core_count", H100.cores))


def choose(gpu: GPU, x: Float[Array, "batch tokens heads head_dim"], features: int) -> TileConfig:
    return TileConfig()
