"""What the TPU kernels of linear attention compile to, at Wan2.1's sizes; needs no TPU.

JAX_PLATFORMS=cpu python benchmarks/kernels_tpu.py

Needs `pip install -e ".[tpu]"`. Nothing is run: memory is the compiler's, times are bounds from
the chip's published peaks.
"""

import re
import sys

import jax
import jax.numpy as jnp

from kernels.ahead_of_time import TOPOLOGIES, VMEM_LIMIT, compile_for_tpu, kernel_vmem
from kernels.linear_attention import FeatureMap, linear_attention
from linvideo_jax.plan.chips import CHIPS
from linvideo_jax.plan.hlo import shape_bytes

SIZES = {"1.3B": (32_760, 12), "14B": (75_600, 40)}  # tokens, heads
HEAD_DIM, FEATURES = 128, 64
PEAKS = {kind: (CHIPS[kind].flops, CHIPS[kind].hbm_bandwidth) for kind in TOPOLOGIES}
# Arrays of tokens: q, k, v, out; then q, k, v, dout read again and dq, dk, dv written.
LEAST_ARRAYS = {"forward": 4, "forward + backward": 11}
# Products of [tokens, 128] and [128, 128] a head.
PRODUCTS = {"forward": 4, "forward + backward": 4 + 10}
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


def compiled(tokens: int, heads: int, what: str, kind: str) -> jax.stages.Compiled:
    """The layer between its projections: arrays of tokens are `[1, tokens, heads * 128]`."""
    flat = jax.ShapeDtypeStruct((1, tokens, heads * HEAD_DIM), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((heads, HEAD_DIM, FEATURES), jnp.float32)

    def forward(q, k, v, feature_map):
        q, k, v = (x.reshape(1, tokens, heads, HEAD_DIM) for x in (q, k, v))
        return linear_attention(q, k, v, feature_map).reshape(flat.shape)

    def both(q, k, v, feature_map, cotangent):
        out, pull = jax.vjp(forward, q, k, v, feature_map)
        return out, pull(cotangent)

    inputs = (flat, flat, flat, FeatureMap(weight, weight))
    if what == "forward":
        return compile_for_tpu(forward, *inputs, kind=kind)
    return compile_for_tpu(both, *inputs, flat, kind=kind)


def moved_bytes(program: jax.stages.Compiled) -> int:
    """Operands and results of all instructions of the program, kernels and others."""
    entry = program.as_text().split("\nENTRY ")[1]
    sizes, total = {}, 0
    for line in entry.splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)", line)
        if match is None:
            continue
        name, shape, operation, operands = match.groups()
        sizes[name] = shape_bytes(shape)
        if operation not in _FREE:
            total += sizes[name] + sum(sizes[one] for one in re.findall(r"%([\w.-]+)", operands))
    return total


def main() -> int:
    """Prints the table; 1 if a program misses one of its limits."""
    print("| chip | layer | direction | moved, MiB | of the least | temporary, MiB |", end="")
    print(" largest VMEM, MiB | bound by bytes, ms | bound by FLOPs, ms |")
    print("|---" * 9 + "|")
    missed = False
    for kind in TOPOLOGIES:
        for layer, (tokens, heads) in SIZES.items():
            for what, arrays in LEAST_ARRAYS.items():
                program = compiled(tokens, heads, what, kind)
                least = arrays * tokens * heads * HEAD_DIM * 2
                moved, vmem = moved_bytes(program), max(kernel_vmem(program).values())
                temporary = program.memory_analysis().temp_size_in_bytes
                flops = PRODUCTS[what] * 2 * tokens * heads * HEAD_DIM * 2 * FEATURES
                peak_flops, peak_bytes = PEAKS[kind]
                print(
                    f"| {kind} | {layer} | {what} | {moved / 2**20:.0f} | {moved / least:.3f} "
                    f"| {temporary / 2**20:.2f} | {vmem / 2**20:.2f} "
                    f"| {1e3 * moved / peak_bytes:.3f} | {1e3 * flops / peak_flops:.3f} |"
                )
                features_of_one_head = tokens * 2 * FEATURES * 2
                missed |= moved > 1.2 * least or vmem > VMEM_LIMIT
                missed |= temporary > features_of_one_head
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
