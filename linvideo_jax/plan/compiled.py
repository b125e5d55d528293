"""The update of a run, compiled and not run: memory and communication of one chip."""

import math
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kernels.dispatch import compiling_for
from linvideo_jax import rehearsal
from linvideo_jax.plan import collectives
from linvideo_jax.plan.collectives import Communication
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe

_TOO_LARGE = (
    # What was needed, what there is.
    re.compile(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"),
    re.compile(r"memory required.*?\(([\d.]+[KMGT])\).*?available HBM.*?\(([\d.]+[KMGT])\)"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Held:
    """Bytes on one chip, from shapes and shardings alone, of what lives from update to update."""

    parameters: int
    optimiser: int
    other: int  # scores, moving average, what an objective keeps
    teacher: int
    batch: int

    @property
    def total(self) -> int:
        """Of all of them."""
        return self.parameters + self.optimiser + self.other + self.teacher + self.batch


@dataclass(frozen=True)
class Compiled:
    """One compilation of the update; bytes are of one chip, communication of one update.

    peak: all that the program needs at once. mixed, rounded: while every layer computes both
    attentions, and after the scores are rounded; None if the compiler refused the program because
    it does not fit, and then `held` and `peak` are all that is known. kernels: of attention, in
    words.
    """

    batch_size: int
    held: Held
    peak: int
    mixed: Communication | None
    rounded: Communication | None
    kernels: str
    seconds: float

    @property
    def temporaries(self) -> int:
        """Activations, gradients, gathered layers and what the compiler adds."""
        return self.peak - self.held.total


def compile_update(
    config, mesh: Mesh, platform: str, batch_size: int, simulated: bool = False
) -> Compiled:
    """Compiles `training.update` for a mesh of devices, real or described.

    platform: "tpu", "gpu" or "cpu". simulated: CPU devices stand for others, so communication is
    counted in what the partitioner made: the CPU's own passes widen bfloat16 and sum in whole.
    UserError as `rehearsal.problem` and `rehearsal.recipe`.
    """
    began = time.time()
    simulated = simulated and mesh.size > 1  # for one device XLA runs no partitioner
    given = rehearsal.problem(config)
    recipe = rehearsal.recipe(config, given, mesh)
    recipe = replace(recipe, batch_size=batch_size)
    arguments = rehearsal.arguments(config, recipe, given, mesh)
    held = _held(arguments)
    with compiling_for(platform), tempfile.TemporaryDirectory() as folder:
        lowered = training.update.lower(recipe, *arguments)
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        try:
            program = lowered.compile(compiler_options=dump if simulated else None)
        except jax.errors.JaxRuntimeError as error:
            peak = refused(str(error))
            if peak is None:
                raise
            return Compiled(batch_size, held, peak, None, None, "", time.time() - began)
        text, memory = program.as_text(), program.memory_analysis()
        if simulated:
            (made,) = Path(folder).glob("*update*.after_spmd-partitioning.*.txt")
            text = made.read_text()
    return Compiled(
        batch_size,
        held,
        _peak(memory, platform),
        collectives.count(text, mesh.size, (0, 0, 1), simulated),
        collectives.count(text, mesh.size, _shares(config, recipe), simulated),
        _kernels(text),
        time.time() - began,
    )


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


def _shares(config, recipe: Recipe) -> tuple[float, float, float]:
    """How often a layer is softmax, linear and mixed after rounding, in the order of `wan`."""
    linear = config.transfer.target / recipe.student.num_layers
    return 1 - linear, linear, 0.0


def _held(arguments: tuple[Any, ...]) -> Held:
    state, teacher, batch, *_ = arguments
    parts = {name: _bytes(tree) for name, tree in state.items()}
    parameters = parts.pop("params")
    optimiser = parts.pop("optimizer") + parts.pop("warmup")
    return Held(parameters, optimiser, sum(parts.values()), _bytes(teacher), _bytes(batch))


def _bytes(tree: Any) -> int:
    """Bytes on one chip of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def refused(message: str) -> int | None:
    """Bytes that a program needs which the compiler refused for that; None for another error."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            return int(float(match[1][:-1]) * _UNITS[match[1][-1]])
    return None
