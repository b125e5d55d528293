"""Stage smoke: a few updates on random weights and pairs, the first minute on a new machine.

It is the update, the mesh and the table of stage transfer, without any file: what does not run
here does not train, and what it prints is what training will take.
"""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from linvideo_jax import rehearsal
from linvideo_jax.errors import UserError, check_counts
from linvideo_jax.metrics import step_flops
from linvideo_jax.metrics.step_flops import Layers
from linvideo_jax.models import wan
from linvideo_jax.models.module import init
from linvideo_jax.parallel import hosts
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.placement import Placement
from linvideo_jax.plan import chips
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import knobs_at

GIB = chips.GIB


def run(config, workdir: Path | None = None) -> None:
    """Makes `config.smoke.num_steps` updates and prints what they took; writes nothing."""
    check_counts("smoke", config.smoke, ("num_steps", "samples"))
    measured = measure(with_batch(config), config.smoke.num_steps)
    if not np.isfinite(measured["losses"]).all():
        raise UserError(
            f"the losses of random weights are {measured['losses']}: this machine or its JAX does "
            "not compute right; try --config.dtype=float32 to see more."
        )
    if hosts.is_first():
        print(page(measured))


def with_batch(config):
    """The configuration with `smoke.samples` for every part of the batch on all devices."""
    sizes = meshes.resolve(meshes.of_config(config), jax.device_count())
    parts = sizes["data"] * sizes["fsdp"] * config.transfer.accumulate
    config = config.copy_and_resolve_references()
    config.transfer.batch_size = config.smoke.samples * parts
    return config


def measure(
    config,
    num_steps: int,
    say: Callable[[str], None] = print,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Times `num_steps` updates after one that compiles; figures by name, ready for JSON.

    devices: of the mesh; None for all of all hosts.
    seconds: of each; mfu: forward and backward of the median step over the peak, None for a chip
    whose peak is not known; memory: bytes at most in use on a chip, of the process on a CPU.
    """
    given = rehearsal.problem(config)
    placement = Placement.of(config, given.models.transformer.num_attention_heads, devices)
    recipe = rehearsal.recipe(config, given, placement.mesh)
    here, num_chips = chips.here(), placement.mesh.size
    say(
        f"{config.model} on {num_chips} x {here.chip.name}, mesh "
        f"{meshes.describe(placement.mesh)}, {jax.process_count()} host(s): random weights ..."
    )
    weights = placement.make(lambda: init(wan.WanTransformer, recipe.teacher))

    def initial(weights):
        own = training.initial_state(config.transfer, recipe.student, weights)
        sample = given.latent_shape, given.text_shape
        return own | training.objectives_state(recipe, weights, *sample)

    state = placement.make(initial, weights)
    teacher = training.frozen(weights, recipe.dtype)
    del weights
    rng = np.random.default_rng(config.seed)
    rows = placement.rows(recipe.batch_size, recipe.accumulate)
    batch = rehearsal.batch(config, replace(recipe, batch_size=len(rows)), given, rng)
    batch = placement.batch(batch, recipe.batch_size)
    knobs = knobs_at(config.transfer, config.transfer.warmup_steps, 1e-6, 1.0, True)
    say("compiling ...")
    seconds, losses = [], []
    for step in range(num_steps + 1):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        start = time.perf_counter()
        state, metrics = training.update(recipe, state, teacher, batch, knobs, key)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        say(f"step {step}: {seconds[-1]:.3g} s, loss {losses[-1]:.4g}")
    layers = Layers(0, 0, recipe.student.num_layers)
    work = step_flops.update(recipe, given.size, layers, recipe.batch_size)
    median = float(np.median(seconds[1:]))
    peak = num_chips * here.chip.flops
    return {
        "model": config.model,
        "chip": here.chip.name,
        "num_chips": num_chips,
        "mesh": dict(placement.mesh.shape),
        "tokens": given.size.tokens,
        "batch_size": recipe.batch_size,
        "accumulate": recipe.accumulate,
        "remat": recipe.remat,
        "objective": recipe.objective,
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "losses": losses,
        "tflop": work.model / 1e12,
        "tflop_recomputed": work.recomputed / 1e12,
        "mfu": work.model / median / peak if peak else None,
        "memory": _memory(),
        "memory_limit": here.chip.hbm,
    }


def _memory() -> int:
    used = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    if None in used:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(used)


def page(measured: dict[str, Any]) -> str:
    """The figures of `measure` as text."""
    seconds = measured["seconds"]
    median = float(np.median(seconds))
    again = measured["tflop_recomputed"]
    rate = (measured["tflop"] + again) / median / measured["num_chips"]
    mfu = "peak of this chip not known"
    if measured["mfu"] is not None:
        mfu = f"MFU {measured['mfu']:.1%} of its peak, not counting what is computed again"
    return "\n".join(
        [
            f"first step, with compilation: {measured['first_seconds']:.1f} s",
            f"step: {median:.3g} s ({min(seconds):.3g} to {max(seconds):.3g}), batch "
            f"{measured['batch_size']}, {measured['tokens']:,} tokens, remat {measured['remat']}",
            f"arithmetic: {measured['tflop']:,.3g} TFLOP a step and {again:,.3g} again; "
            f"{rate:.3g} TFLOP/s a chip; {mfu}",
            f"memory: {measured['memory'] / GIB:.2f} GiB at most, of "
            f"{measured['memory_limit'] / GIB:.1f} a chip",
            "it works: --plan says what a run takes",
        ]
    )
