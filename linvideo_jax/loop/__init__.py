"""One training loop for every stage: steps, metrics, checkpoints, interruption, exact resume."""

from linvideo_jax.loop.budget import steps_within
from linvideo_jax.loop.guard import Guard
from linvideo_jax.loop.json_files import read_json, write_json
from linvideo_jax.loop.metrics_file import MetricsFile, read_metrics
from linvideo_jax.loop.running import Diverged, Metrics, run
from linvideo_jax.loop.signals import Interrupted

__all__ = [
    "Diverged",
    "Guard",
    "Interrupted",
    "Metrics",
    "MetricsFile",
    "read_json",
    "read_metrics",
    "run",
    "steps_within",
    "write_json",
]
