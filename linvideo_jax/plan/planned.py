"""A plan: what was compiled and counted, and what follows from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh

from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.placement import check_batch
from linvideo_jax.plan import chips, simulated, stages, times
from linvideo_jax.plan.chips import Machine
from linvideo_jax.plan.collectives import Communication
from linvideo_jax.plan.compiled import Compiled, compile_updates
from linvideo_jax.plan.stage import Phase, Stage
from linvideo_jax.plan.times import Range

# Of the memory of a GPU or a host; a TPU's compiler knows what is reserved there. The programs let
# JAX have 2% more of a GPU (device_memory.SHARE), for what its allocator cannot use.
USABLE = 0.92


@dataclass(frozen=True)
class Plan:
    """All that the page tells.

    sizes: of the mesh's axes. chosen: the compilation at the configuration's batch size, other: at
    another one, None if it was of no use. estimate, other_estimate: for these two, bytes by name,
    by `Stage.estimate`, which stands for the compiler's where that is not here (`formula`). unit:
    samples of the smallest batch of which every chip has a part.
    """

    config: Any
    machine: Machine
    stage: Stage
    recipe: Any
    sizes: dict[str, int]
    chosen: Compiled
    other: Compiled | None
    estimate: dict[str, int]
    other_estimate: dict[str, int] | None
    phases: tuple[Phase, ...]
    unit: int

    @property
    def formula(self) -> dict[str, int] | None:
        """The estimate, for a machine whose compiler is not here; else None."""
        known = self.machine.is_tpu or self.machine.text == "here"
        return None if known else self.estimate

    @property
    def limit(self) -> float:
        """Bytes that a program may take on one chip."""
        return self.machine.chip.hbm * (1 if self.machine.is_tpu else USABLE)

    @property
    def peak(self) -> float:
        """Bytes that the update takes on one chip: the compiler's, or the formula's."""
        return sum(self.formula.values()) if self.formula else self.chosen.peak

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.peak <= self.limit

    @property
    def largest_batch(self) -> int | None:
        """The largest batch that fits, by a line through both compilations, or both estimates; 0 if
        none does, None if it is not known."""
        if self.other is None:
            return None
        other = sum(self.other_estimate.values()) if self.formula else self.other.peak
        slope = (self.peak - other) / (self.chosen.batch_size - self.other.batch_size)
        if slope <= 0:
            return None
        room = self.chosen.batch_size + (self.limit - self.peak) / slope
        return max(math.floor(room / self.unit) * self.unit, 0)

    @property
    def sent(self) -> dict[str, Communication]:
        """Of one update by name (`Phase.sent`); the other compilation's where the chosen one was
        refused, and empty where both were."""
        return self.chosen.sent or (self.other.sent if self.other else {})

    @property
    def update_seconds(self) -> dict[str, Range]:
        """Of one update of each phase."""
        return {
            phase.name: times.seconds(phase.work, self.machine, self.sent.get(phase.sent))
            for phase in self.phases
        }

    @property
    def training_seconds(self) -> Range:
        """Of the stage, without compilation, checkpoints and reading."""
        seconds = self.update_seconds
        return times.total([(phase.count, seconds[phase.name]) for phase in self.phases])

    @property
    def collection_seconds(self) -> Range | None:
        """Of stage collect, without text encoding and writing; None if the stage needs no pairs."""
        work = self.stage.collection
        return None if work is None else times.seconds(work, self.machine)


def make(config, text: str, say: Callable[[str], None] = print) -> Plan:
    """Compiles for the machine that `text` names: `chips.machine`, or "here".

    say: is told before what takes long. UserError for a machine or a mesh that is none, and for a
    configuration without a stage that is planned.
    """
    stage = stages.of(config)
    machine = chips.here() if text == "here" else chips.machine(text)
    sizes = meshes.resolve(meshes.of_config(config), machine.num_chips)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    batch = stage.settings.batch_size
    check_batch(mesh, batch, stage.settings.accumulate)
    recipe = stage.recipe(mesh, batch)
    unit = sizes["data"] * sizes["fsdp"] * stage.settings.accumulate
    # A second one gives the line on which larger batches lie.
    batches = batch, unit if batch > unit else 2 * unit
    if text == "here" or machine.is_tpu:
        devices = jax.devices() if text == "here" else chips.tpu_devices(machine)
        chosen, other = _compiled(config, meshes.make(sizes, devices), batches, machine, say)
    else:
        say(f"compiling the updates for {machine.num_chips} simulated devices ...")
        chosen, other = simulated.compile_updates(config, machine.num_chips, batches)
    estimates = [
        one and stage.estimate(replace(recipe, batch_size=one.batch_size), mesh, one.held)
        for one in (chosen, other)
    ]
    phases = stage.phases(recipe)
    return Plan(config, machine, stage, recipe, sizes, chosen, other, *estimates, phases, unit)


def _compiled(config, mesh, batches, machine, say) -> tuple[Compiled, Compiled | None]:
    platform = mesh.devices.flat[0].platform
    say(f"compiling the updates for {machine.text}, batch {batches[0]} ...")
    chosen = compile_updates(config, mesh, platform, batches[0])
    if not chosen.sent and batches[1] > batches[0]:
        return chosen, None  # what is larger does not fit either
    say(f"compiled in {chosen.seconds:.0f} s; again, batch {batches[1]} ...")
    return chosen, compile_updates(config, mesh, platform, batches[1])
