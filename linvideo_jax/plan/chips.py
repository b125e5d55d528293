"""What a chip can do, from its maker's data sheets, and the machines that --plan names."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace

import jax

from kernels.ahead_of_time import tpu_chips
from linvideo_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    flops: bfloat16, dense, a second. hbm: bytes. hbm_bandwidth: bytes a second. one_way: bytes a
    second that a chip sends to its neighbours, (slowest, fastest): on a torus over one of its
    dimensions or over all; on GPUs over the network card or over NVLink. efficiency: share of the
    peak that large products and attention reach in a good program, (low, high), an assumption but
    for the H100's high end.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    one_way: tuple[float, float]
    efficiency: tuple[float, float]
    dimensions: int = 0  # of a TPU's torus
    device_kind: str = ""  # as JAX calls it


# TPUs: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}; interconnects are given there as both
# directions of all links together, 400, 1,200 and 800 GB/s. HBM is what the compiler gives a
# program (it refuses more by name), a little below the data sheet's 16, 95 and 32 GB.
# GPUs: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM), NVLink 600 and 900 GB/s both
# directions, one network card of 200 or 400 Gbit/s a GPU as in a DGX.
# Efficiency: one H100 made a forward of 1.3B with 14 softmax layers of 32,760 tokens at 52% of its
# peak; no step was measured on several GPUs or on any TPU.
CHIPS = {
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 819e9, (100e9, 200e9), (0.3, 0.55), 2, "TPU v5 lite"),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2765e9, (200e9, 600e9), (0.3, 0.55), 3, "TPU v5"),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1640e9, (200e9, 400e9), (0.25, 0.5), 2, "TPU v6 lite"),
    "a100": Chip("a100", 312e12, 80e9, 2039e9, (25e9, 300e9), (0.35, 0.55), 0, "NVIDIA A100"),
    "h100": Chip("h100", 989e12, 80e9, 3350e9, (50e9, 450e9), (0.35, 0.52), 0, "NVIDIA H100"),
    "h200": Chip("h200", 989e12, 141e9, 4800e9, (50e9, 450e9), (0.35, 0.52), 0, "NVIDIA H200"),
}
GPUS_A_HOST = 8
EXAMPLES = "v5p:4x4x4, v5e:8x8, v6e:8x8, h100:32 or here"


@dataclass(frozen=True)
class Machine:
    """Chips of one kind; text: as the user wrote it, which is libtpu's name for a TPU slice."""

    text: str
    chip: Chip
    num_chips: int

    @property
    def is_tpu(self) -> bool:
        """Whether the program can be compiled for it on any machine."""
        return self.chip.dimensions > 0

    @property
    def one_way(self) -> tuple[float, float]:
        """`Chip.one_way` of this machine: GPUs of one host have NVLink alone."""
        slow, fast = self.chip.one_way
        return (fast, fast) if not self.is_tpu and self.num_chips <= GPUS_A_HOST else (slow, fast)


def machine(text: str) -> Machine:
    """What --plan names: KIND:SIDExSIDE[xSIDE] for TPUs, KIND:COUNT for GPUs.

    UserError for a kind or a shape that is none.
    """
    kind, _, shape = text.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise UserError(
            f"--plan={text} names no chip that is known; choose {', '.join(CHIPS)}, such as "
            f"{EXAMPLES}."
        )
    if not chip.dimensions:
        if not re.fullmatch(r"[1-9]\d*", shape):
            raise UserError(f"--plan={text} names no number of GPUs: write {kind}:8, for example.")
        return Machine(text, chip, int(shape))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.dimensions:
        example = "x".join("4" * chip.dimensions)
        raise UserError(
            f"--plan={text} names no shape of a {kind} slice, which has {chip.dimensions} sides: "
            f"write {kind}:{example}, for example."
        )
    return Machine(text, chip, math.prod(map(int, shape.split("x"))))


def here() -> Machine:
    """JAX's devices on all hosts; a chip that is not in the table has no peaks."""
    device = jax.devices()[0]
    kinds = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.device_kind)]
    chip = max(kinds, key=lambda chip: len(chip.device_kind), default=None)
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit")
    if memory is None and device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    if chip is None:
        chip = Chip(device.device_kind, 0.0, memory or 0.0, 0.0, (0.0, 0.0), (0.0, 0.0))
    elif memory:
        chip = replace(chip, hbm=memory)
    return Machine("here", chip, jax.device_count())


def tpu_devices(machine: Machine) -> list:
    """Its chips as libtpu describes them; UserError if libtpu is not here or has no such slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'--plan={machine.text} needs TPU\'s compiler: pip install -e ".[tpu]".')
    try:
        return tpu_chips(machine.text)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"--plan={machine.text} is no slice that TPU's compiler knows ({reason}): choose "
            f"another, such as {EXAMPLES}."
        ) from None
