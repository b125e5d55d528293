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
    parts.append(_collection(plan))
    if not plan.fits:
        parts.append("It does not fit. Change one of: " + "; ".join(advice.changes(plan)) + ".")
    return "\n\n".join(parts)


def _header(plan: Plan) -> str:
    sampling, recipe = plan.given.sampling, plan.recipe
    size = "{width} x {height} x {num_frames}".format(**sampling)
    mesh = ", ".join(f"{name}:{size}" for name, size in plan.sizes.items())
    if isinstance(recipe.layout, MeshLayout) and plan.sizes["context"] > 1:
        mesh += f", exchange {recipe.layout.exchange}"
    target = plan.config.transfer.target
    return "\n".join(
        [
            f"{plan.config.model}, {size}: {plan.given.size.tokens:,} tokens; "
            f"{target} of {recipe.student.num_layers} layers linear",
            f"update: {recipe.objective}, batch {recipe.batch_size} in {recipe.accumulate} part"
            f"{'s' * (recipe.accumulate > 1)}, {recipe.optimizer}, remat {recipe.remat}, "
            f"products in {recipe.dtype}",
            f"machine: {plan.machine.text}, {plan.machine.num_chips} x {plan.machine.chip.name}; "
            f"mesh {mesh}",
            f"attention compiled: {plan.chosen.kernels or (plan.other and plan.other.kernels)}",
        ]
    )


def _memory(plan: Plan) -> str:
    held, chosen = plan.chosen.held, plan.chosen
    rows = [
        ("student's weights", held.parameters),
        ("optimiser", held.optimiser),
        ("other state", held.other),
        ("teacher", held.teacher),
        ("batch", held.batch),
    ]
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
    names = "warm-up", "mixed layers", "rounded layers"
    for name, work in zip(
        names, (plan.steps.warmup, plan.steps.mixed, plan.steps.rounded), strict=True
    ):
        lines.append(
            f"  {name:<16}{_number(work.model / 1e12):>9} and {_number(work.recomputed / 1e12)} "
            f"computed again; {_number(work.total / 1e12 / plan.machine.num_chips)} a chip"
        )
    if plan.recipe.optimizer == "muon":
        muon = _number(step_flops.muon(plan.recipe.student) / 1e12)
        lines.append(f"  Muon's orthogonalisation adds {muon} a step, whatever the batch")
    return "\n".join(lines)


def _communication(plan: Plan) -> str:
    program = "the compiled program" if plan.formula is None else "what XLA's partitioner made"
    lines = [f"sent by one chip in one update (counted in {program}, loops included):"]
    for name, part in zip(("mixed", "rounded"), plan.communication, strict=True):
        if part is None:
            return lines[0] + "\n  not known: the compiler refused the program"
        for kind, (calls, sent) in part.by_kind().items():
            lines.append(f"  {name:<9}{kind:<20}{calls:7,.0f} calls {_number(sent / GIB):>9} GiB")
        if not part.by_kind():
            lines.append(f"  {name:<9}nothing")
        if part.unknown_loops:
            lines.append(f"  ({part.unknown_loops} loops of unknown length are counted once)")
    return "\n".join(lines)


def _times(plan: Plan) -> str:
    chip = plan.machine.chip
    warmup, mixed, rounded = plan.step_seconds
    first, second, third = plan.steps.counts
    slow, fast = plan.machine.one_way
    low, high = chip.efficiency
    known = plan.communication[0] is not None
    return "\n".join(
        [
            "time: a model, not a measurement" + ("" if known else "; without communication"),
            f"  a step: warm-up {_seconds(warmup)}, mixed {_seconds(mixed)}, rounded "
            f"{_seconds(rounded)}",
            f"  {first:,} + {second:,} + {third:,} steps: {_long(plan.training_seconds)}",
            f"  assumed: {low:.0%} to {high:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s; "
            f"{slow / 1e9:.0f} to {fast / 1e9:.0f} GB/s sent by a chip, fast end overlapped with "
            "arithmetic, slow end after it; no compilation, reading, checkpoints",
        ]
    )


def _collection(plan: Plan) -> str:
    sampling, collect = plan.given.sampling, plan.config.collect
    steps = sampling["num_inference_steps"]
    frames, height, width, channels = plan.given.latent_shape
    arrays = len(FIELDS[collect.store_velocity]) if collect.mode == "stored" else 0
    stored = collect.num_videos * steps * arrays * 2 * frames * height * width * channels
    work = plan.collection.total
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
