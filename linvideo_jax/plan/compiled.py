"""The updates of a run, compiled and not run: memory and communication of one chip."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kernels.dispatch import compiling_for
from linvideo_jax.plan import collectives, memory, stages
from linvideo_jax.plan.collectives import Communication

_TOO_LARGE = (
    # What was needed, what there is.
    re.compile(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"),
    re.compile(r"memory required.*?\(([\d.]+[KMGT])\).*?available HBM.*?\(([\d.]+[KMGT])\)"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """One compilation of a stage's updates; bytes are of one chip.

    held: by name, from shapes and shardings alone, of what lives from update to update. peak: all
    that is needed at once: by a program, and of `held` what that does not see. sent: the
    communication of one update by name (as `Program.counted`); empty if the compiler refused a
    program because it does not fit, and then `held` and `peak` are all that is known. kernels: of
    attention, in words.
    """

    batch_size: int
    held: dict[str, int]
    peak: int
    sent: dict[str, Communication]
    kernels: str
    seconds: float

    @property
    def kept(self) -> int:
        """All of what lives from update to update."""
        return sum(self.held.values())

    @property
    def temporaries(self) -> int:
        """Activations, gradients, gathered layers and what the compiler adds."""
        return self.peak - self.kept


def compile_updates(
    config, mesh: Mesh, platform: str, batch_size: int, simulated: bool = False
) -> Compiled:
    """Compiles a stage's updates for a mesh of devices, real or described.

    platform: "tpu", "gpu" or "cpu". simulated: CPU devices stand for others, so communication is
    counted in what the partitioner made: the CPU's own passes widen bfloat16 and sum in whole.
    UserError as `stages.of` and `Stage.recipe`.
    """
    began = time.time()
    simulated = simulated and mesh.size > 1  # for one device XLA runs no partitioner
    stage = stages.of(config)
    recipe = stage.recipe(mesh, batch_size)
    programs = stage.programs(recipe, mesh)
    held, peak, sent, kernels = stage.held(programs), 0, {}, ""
    for program in programs:
        beside = max(sum(held.values()) - memory.held(program.arguments), 0)
        with compiling_for(platform), tempfile.TemporaryDirectory() as folder:
            lowered = program.update.lower(recipe, *program.arguments)
            dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
            try:
                made = lowered.compile(compiler_options=dump if simulated else None)
            except jax.errors.JaxRuntimeError as error:
                needed = refused(str(error))
                if needed is None:
                    raise
                seconds = time.time() - began
                return Compiled(batch_size, held, max(peak, beside + needed), {}, "", seconds)
            text, needed = made.as_text(), _peak(made.memory_analysis(), platform)
            kernels = kernels or _kernels(text)
            if simulated:
                (dumped,) = Path(folder).glob("*update*.after_spmd-partitioning.*.txt")
                text = dumped.read_text()
        peak = max(peak, beside + needed)
        for name, shares in program.counted.items():
            sent[name] = collectives.count(text, mesh.size, shares, simulated, program.loops)
    return Compiled(batch_size, held, peak, sent, kernels, time.time() - began)


def _peak(memory: Any, platform: str) -> int:
    """Bytes that a program needs at once, of `compiled.memory_analysis()`."""
    if platform == "cpu":  # whose own peak leaves out most temporaries
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def _kernels(text: str) -> str:
    """Which attention a program holds, in words."""
    softmax = "splash" if "splash" in text else "plain JAX, a part of the queries at a time"
    linear = "Pallas" if "state_kernel" in text else "plain JAX"
    return f"softmax by {softmax}, linear by {linear}"


def refused(message: str) -> int | None:
    """Bytes that a program needs which the compiler refused for that; None for another error."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            return int(float(match[1][:-1]) * _UNITS[match[1][-1]])
    return None
