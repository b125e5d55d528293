"""Compilation for a TPU or GPU that is not there, by libtpu or JAX's CUDA plugin."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.dispatch import compiling_for
from kernels.gpu import H100

# What a kernel may use by the compiler's default, on each of these kinds at least.
VMEM_LIMIT = 16 * 2**20
# The smallest topology of each kind.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# XLA's description of an H100 SXM.
H100_CONFIG = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {H100.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{H100.kind}"
"""


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


def lower_for_gpu(function: Callable[..., Any], *shapes: Any) -> jax.stages.Lowered:
    """`function` of arrays of these shapes, lowered for an H100: Pallas' kernels as Triton's IR."""
    with compiling_for("gpu"), _as_on_an_h100():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def compile_for_gpu(
    function: Callable[..., Any], *shapes: Any, **options: Any
) -> jax.stages.Compiled:
    """`function` of arrays of these shapes (trees of ShapeDtypeStruct) compiled for one H100.

    options: of `jax.jit`. Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version
    (tried with 0.11.2), no driver, and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment before
    JAX starts: else the plugin does not load where the CUDA libraries, which it needs to run, are
    missing. What XLA would try out on a GPU, such as algorithms of matrix products, is left at
    defaults.
    """
    gpu = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100_CONFIG
    )
    sharding = jax.sharding.SingleDeviceSharding(gpu.devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with compiling_for("gpu"), _as_on_an_h100():
        return jax.jit(function, **options).lower(*placed).compile()


@contextlib.contextmanager
def _as_on_an_h100() -> Iterator[None]:
    """From JAX 0.11 on Pallas asks which GPU it lowers for."""
    device = AbstractDevice(device_kind=H100.kind, num_cores=H100.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield
