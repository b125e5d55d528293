"""How long a run takes: a model from counted FLOPs, counted bytes and data sheets, as a range.

The fast end: arithmetic at the chip's high efficiency and communication over its fastest links at
the same time, the longer of the two counts. The slow end: arithmetic at the low efficiency, and
then communication over the slowest links.
"""

from dataclasses import dataclass

from linvideo_jax.metrics import step_flops
from linvideo_jax.metrics.step_flops import Layers, Work
from linvideo_jax.plan.chips import Machine
from linvideo_jax.plan.collectives import Communication
from linvideo_jax.rehearsal import Problem
from linvideo_jax.transfer.recipe import Recipe

Range = tuple[float, float]


@dataclass(frozen=True)
class Steps:
    """Work of one update on all chips, in the three parts of stage transfer, and their lengths."""

    warmup: Work
    mixed: Work
    rounded: Work
    counts: tuple[int, int, int]


def steps(config, recipe: Recipe, given: Problem) -> Steps:
    """What `stages/transfer.py` runs: warm-up, mixed layers until `round_at`, rounded layers."""
    settings, layers = config.transfer, recipe.student.num_layers
    rounded = Layers(layers - settings.target, settings.target, 0)
    arguments = recipe, given.size
    choose_at = settings.round_at if settings.selection == "selective" else settings.warmup_steps
    return Steps(
        step_flops.warmup(*arguments, recipe.batch_size),
        step_flops.update(*arguments, Layers(0, 0, layers), recipe.batch_size),
        step_flops.update(*arguments, rounded, recipe.batch_size),
        (settings.warmup_steps, choose_at - settings.warmup_steps, settings.num_steps - choose_at),
    )


def collection(config, recipe: Recipe, given: Problem) -> Work:
    """What stage collect computes, without the text encoder (below a thousandth)."""
    num_steps = given.sampling["num_inference_steps"]
    return step_flops.collect(recipe.teacher, given.size, config.collect.num_videos, num_steps)


def seconds(work: Work, machine: Machine, sent: Communication | None = None) -> Range:
    """(fast, slow) of so much work on all chips; sent: by each chip."""
    chip = machine.chip
    arithmetic = work.total / machine.num_chips / chip.flops
    low, high = chip.efficiency
    slow_link, fast_link = machine.one_way
    bytes_sent = 0.0 if sent is None else sent.sent
    fast = max(arithmetic / high, bytes_sent / fast_link)
    return fast, arithmetic / low + bytes_sent / slow_link


def total(parts: list[tuple[int, Range]]) -> Range:
    """Of (count, seconds of each)."""
    return tuple(sum(count * each[end] for count, each in parts) for end in (0, 1))
