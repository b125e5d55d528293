"""Compilation for a TPU that is not there: on any machine where libtpu is installed."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from kernels.dispatch import compiling_for

# What a kernel may use by the compiler's default, on each of these kinds at least.
VMEM_LIMIT = 16 * 2**20
# The smallest topology of each kind.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def tpu_chips(topology: str) -> list[Any]:
    """The chips of a slice as libtpu describes it, such as "v5p:4x4x4"; none needs to be here."""
    # Else libtpu asks a metadata server, which only cloud machines have, about this machine and
    # warns of what it does not learn, and refuses a second process, though neither has a chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_for_tpu(function: Callable[..., Any], *shapes: Any, kind: str) -> jax.stages.Compiled:
    """`function` of arrays of these shapes (trees of ShapeDtypeStruct) compiled for one chip.

    `kind`: of TOPOLOGIES.
    """
    sharding = jax.sharding.SingleDeviceSharding(tpu_chips(TOPOLOGIES[kind])[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with compiling_for("tpu"):
        return jax.jit(function).lower(*placed).compile()


def kernel_vmem(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of VMEM that each Pallas kernel of a TPU program uses, both halves of buffers."""
    sizes = {}
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line).group(1)
            sizes[line.split("=")[0].strip()] = int(re.search(r'"size":"(\d+)"', used).group(1))
    return sizes
