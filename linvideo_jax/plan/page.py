"""A plan as text for a terminal."""

from linvideo_jax.data.trajectories import FIELDS
from linvideo_jax.metrics import step_flops
from linvideo_jax.parallel.layout import MeshLayout
from linvideo_jax.plan import advice
from linvideo_jax.plan.chips import GIB
from linvideo_jax.plan.planned import USABLE, Plan
from linvideo_jax.plan.times import Range

_HOUR, _DAY = 3600, 86_400
# FLOP/s at which a dense prototype collected, in 14 and 308 hours of an H100.
H100 = 0.58 * 989e12


def text(plan: Plan) -> str:
    """The whole page."""
    parts = [_header(plan), _memory(plan), _work(plan), _communication(plan)]
    if plan.machine.chip.flops:
        parts.append(_times(plan))
    if plan.stage.collection is not None:
        parts.append(_collection(plan))
    if not plan.fits:
        parts.append("It does not fit. Change one of: " + "; ".join(advice.changes(plan)) + ".")
    return "\n\n".join(parts)


def _header(plan: Plan) -> str:
    given, recipe = plan.stage.given, plan.recipe
    size = "{width} x {height} x {num_frames}".format(**given.sampling)
    mesh = ", ".join(f"{name}:{size}" for name, size in plan.sizes.items())
    if isinstance(recipe.layout, MeshLayout) and plan.sizes["context"] > 1:
        mesh += f", exchange {recipe.layout.exchange}"
    layers, update = plan.stage.about(recipe)
    return "\n".join(
        [
            f"{plan.config.model}, {size}: {given.size.tokens:,} tokens; {layers}",
            update,
            f"machine: {plan.machine.text}, {plan.machine.num_chips} x {plan.machine.chip.name}; "
            f"mesh {mesh}",
            f"attention compiled: {plan.chosen.kernels or (plan.other and plan.other.kernels)}",
        ]
    )


def _memory(plan: Plan) -> str:
    chosen = plan.chosen
    rows = list(chosen.held.items())
    limit = plan.limit / GIB
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.formula is None:
        rows.append(("activations, temporaries", chosen.temporaries))
        rows.append(("peak", chosen.peak))
        source = "weights to batch from shapes, peak from the compiler"
    else:
        rows += [(f"{k} (formula)", count) for k, count in plan.formula.items() if k != "held"]
        rows.append(("peak (formula)", plan.peak))
        rows.append(("peak (CPU compiler)", chosen.peak))
        source = (
            f"by a formula from shapes, held against {USABLE:.0%} of the card; the CPU's compiler, "
            "which widens bfloat16 and fuses less, for comparison"
        )
    lines = [f"memory of one chip, GiB ({source}):"]
    lines += [f"  {name:<26}{_number(count / GIB):>8}" for name, count in rows]
    lines.append(f"  of {limit:.1f}: {verdict}")
    if plan.largest_batch:
        lines.append(
            f"  largest batch that fits: about {plan.largest_batch} (a line through batches "
            f"{chosen.batch_size} and {plan.other.batch_size})"
        )
    return "\n".join(lines)


def _work(plan: Plan) -> str:
    lines = ["FLOPs of one update, all chips, TFLOP (our count: products of forward and backward):"]
    for phase in plan.phases:
        work = phase.work
        lines.append(
            f"  {phase.name:<16}{_number(work.model / 1e12):>9} and "
            f"{_number(work.recomputed / 1e12)} computed again; "
            f"{_number(work.total / 1e12 / plan.machine.num_chips)} a chip"
        )
    if plan.stage.settings.get("optimizer") == "muon":
        muon = _number(step_flops.muon(plan.recipe.student) / 1e12)
        lines.append(f"  Muon's orthogonalisation adds {muon} a step, whatever the batch")
    return "\n".join(lines)


def _communication(plan: Plan) -> str:
    program = "the compiled program" if plan.formula is None else "what XLA's partitioner made"
    lines = [f"sent by one chip in one update (counted in {program}, loops included):"]
    if not plan.sent:
        return lines[0] + "\n  not known: the compiler refused the program"
    for name, part in plan.sent.items():
        for kind, (calls, sent) in part.by_kind().items():
            lines.append(f"  {name:<12}{kind:<20}{calls:7,.0f} calls {_number(sent / GIB):>9} GiB")
        if not part.by_kind():
            lines.append(f"  {name:<12}nothing")
        if part.unknown_loops:
            lines.append(f"  ({part.unknown_loops} of unknown length counted {part.loops:g} times)")
    return "\n".join(lines)


def _times(plan: Plan) -> str:
    chip = plan.machine.chip
    slow, fast = plan.machine.one_way
    low, high = chip.efficiency
    each = ", ".join(f"{name} {_seconds(value)}" for name, value in plan.update_seconds.items())
    counts = " + ".join(f"{phase.count:,}" for phase in plan.phases)
    return "\n".join(
        [
            "time: a model, not a measurement" + ("" if plan.sent else "; without communication"),
            f"  an update: {each}",
            f"  {counts} updates: {_long(plan.training_seconds)}",
            f"  assumed: {low:.0%} to {high:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s; "
            f"{slow / 1e9:.0f} to {fast / 1e9:.0f} GB/s sent by a chip, fast end overlapped with "
            "arithmetic, slow end after it; no compilation, reading, checkpoints",
        ]
    )


def _collection(plan: Plan) -> str:
    sampling, collect = plan.stage.given.sampling, plan.config.collect
    steps = sampling["num_inference_steps"]
    frames, height, width, channels = plan.stage.given.latent_shape
    arrays = len(FIELDS[collect.store_velocity]) if collect.mode == "stored" else 0
    stored = collect.num_videos * steps * arrays * 2 * frames * height * width * channels
    work = plan.stage.collection.total
    lines = [
        f"collection: {collect.num_videos:,} videos of {steps} guided steps, "
        f"{_number(work / 1e18)} EFLOP, about {_number(work / H100 / _HOUR)} H100-hours; "
        f"{_number(stored / 1e9)} GB stored",
    ]
    if plan.machine.chip.flops:
        lines.append(f"  on this machine {_long(plan.collection_seconds)} (model, as above)")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _seconds(value: Range) -> str:
    return f"{value[0]:.3g} to {value[1]:.3g} s"


def _long(value: Range) -> str:
    if value[1] >= 2 * _DAY:
        return f"{value[0] / _DAY:.1f} to {value[1] / _DAY:.1f} days"
    return f"{value[0] / _HOUR:.2g} to {value[1] / _HOUR:.2g} hours"
