"""What the code asks of the GPU that a kernel is for."""

from typing import NamedTuple

import jax

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming
# Guide, technical specifications per compute capability).
SHARED_MEMORY = {8.0: 163, 8.6: 99, 8.7: 163, 8.9: 99, 9.0: 227, 10.0: 227, 10.3: 227, 12.0: 99}
SHARED_MEMORY = {capability: kib * 1024 for capability, kib in SHARED_MEMORY.items()}


class GPU(NamedTuple):
    """What a kernel is compiled for."""

    kind: str
    capability: float
    cores: int  # streaming multiprocessors

    @property
    def shared_memory(self) -> int:
        return SHARED_MEMORY.get(self.capability, min(SHARED_MEMORY.values()))


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
