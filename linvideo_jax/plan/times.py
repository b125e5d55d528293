"""How long a run takes: a model from counted FLOPs, counted bytes and data sheets, as a range.

The fast end: arithmetic at the chip's high efficiency and communication over its fastest links at
the same time, the longer of the two counts. The slow end: arithmetic at the low efficiency, and
then communication over the slowest links.
"""

from linvideo_jax.metrics.step_flops import Work
from linvideo_jax.plan.chips import Machine
from linvideo_jax.plan.collectives import Communication

Range = tuple[float, float]


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
