"""Compilation for GPUs on a machine without: XLA's CPU compiler with as many simulated devices.

In a process of its own, since the number of devices is fixed when JAX starts. What it gives is the
program that XLA's partitioner makes, so shapes and communication; the GPU's own compiler fuses
and schedules otherwise, so memory is nearer to an upper bound. Nothing comes from the cache of
compiled programs, which holds no partitioner's text.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from linvideo_jax.plan import compiled
from linvideo_jax.plan.compiled import Compiled


def compile_updates(config, num_devices: int, batch_sizes: tuple[int, ...]) -> list[Compiled]:
    """`compiled.compile_updates` on a mesh of simulated devices, for each of the batch sizes."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment  # what a spawned process starts with
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_here, config, batch_sizes).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _here(config, batch_sizes: tuple[int, ...]) -> list[Compiled]:
    from linvideo_jax.parallel import mesh as meshes

    mesh = meshes.from_config(config)
    return [
        compiled.compile_updates(config, mesh, "cpu", batch_size, simulated=True)
        for batch_size in batch_sizes
    ]
