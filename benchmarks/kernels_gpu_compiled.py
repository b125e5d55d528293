"""What the GPU kernels of linear attention compile to for an H100, at Wan2.1's sizes; needs no GPU.

python benchmarks/kernels_gpu_compiled.py

Needs JAX's CUDA plugin (pip install jax-cuda13-plugin jax-cuda13-pjrt, of JAX's version), no
driver. With the package triton 3.6 it also prints registers and spills of each kernel, by that
package's compiler and ptxas, which need not be the versions inside XLA. Nothing is run.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DUMP = tempfile.mkdtemp()
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from kernels_tpu import LEAST_ARRAYS, moved_bytes  # noqa: E402

from kernels.ahead_of_time import compile_for_gpu, lower_for_gpu  # noqa: E402
from kernels.gpu import H100  # noqa: E402
from kernels.linear_attention import FeatureMap, gpu_tiles, linear_attention  # noqa: E402
from kernels.linear_attention.gpu_tiles import KERNELS, Layer  # noqa: E402

SIZES = {"1.3B": (32_760, 12), "14B": (75_600, 40)}  # tokens, heads
HEAD_DIM, FEATURES = 128, 64
MEMORY_GOAL = 64 * 2**20


def program(tokens: int, heads: int, what: str):
    """The layer's function and the shapes of its arguments."""
    x = jax.ShapeDtypeStruct((1, tokens, heads, HEAD_DIM), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((heads, HEAD_DIM, FEATURES), jnp.float32)

    def both(q, k, v, feature_map, cotangent):
        out, pull = jax.vjp(linear_attention, q, k, v, feature_map)
        return out, pull(cotangent)

    inputs = (x, x, x, FeatureMap(weight, weight))
    return (linear_attention, inputs) if what == "forward" else (both, (*inputs, x))


def shared_memory() -> dict[str, int]:
    """Bytes of each of our kernels in the program compiled last, by XLA's list of launches."""
    newest = max(Path(DUMP).glob("*thunk_sequence.txt"), key=lambda path: path.stat().st_mtime)
    found = re.findall(r"\] (\w+) grid: .*shared_memory: (\d+) bytes", newest.read_text())
    return {name: int(size) for name, size in found if name in KERNELS}


def registers(function, inputs) -> dict[str, str]:
    """Registers and stack of a thread, and matrix instructions, of each kernel, by ptxas.

    Raises: ImportError without the package triton.
    """
    import triton
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    target = GPUTarget("cuda", 90, 32)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    module = lower_for_gpu(function, *inputs).compiler_ir("stablehlo")
    calls = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            if "xla.gpu.triton" in str(attributes["call_target_name"]):
                calls.append(attributes["mhlo.backend_config"])
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    found = {}
    for call in calls:
        name, warps, stages = call["name"].value, call["num_warps"].value, call["num_stages"].value
        context = ir.Context()
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        with context:
            text = str(ir.Module.parse(call["ir"].value_bytes))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.ttir"
            path.write_text(text)
            # triton.compile takes this as past its first passes, which XLA runs: run them.
            triton_context = triton_ir.context()
            triton_ir.load_dialects(triton_context)
            backend = CUDABackend(target)
            backend.load_dialects(triton_context)
            parsed = triton_ir.parse_mlir_module(str(path), triton_context)
            parsed.context = triton_context
            options = {"num_warps": warps, "num_stages": stages}
            parsed = CUDABackend.make_ttir(parsed, {}, backend.parse_options(options), 90)
            path.write_text(str(parsed))
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(triton.compile(str(path), target, options).asm["cubin"])
            usage = subprocess.run(
                [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
            ).stdout
            code = subprocess.run(
                [tool, "-sass", binary], capture_output=True, text=True, check=True
            ).stdout
        used, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        found[name] = f"{used} | {stack} | {len(re.findall(r'HGMMA', code))}"
    return found


def main() -> int:
    """Prints the tables; 1 if a program misses one of its limits."""
    print(
        "| layer | direction | moved, MiB | of the least | temporary, MiB |\n|---|---|---|---|---|"
    )
    missed, shared = False, {}
    for layer, (tokens, heads) in SIZES.items():
        for what, arrays in LEAST_ARRAYS.items():
            function, inputs = program(tokens, heads, what)
            compiled = compile_for_gpu(function, *inputs)
            temporary = compiled.memory_analysis().temp_size_in_bytes
            moved, least = moved_bytes(compiled), arrays * tokens * heads * HEAD_DIM * 2
            shared[layer, what] = shared_memory()
            missed |= temporary > MEMORY_GOAL
            print(
                f"| {layer} | {what} | {moved / 2**20:.0f} | {moved / least:.3f} "
                f"| {temporary / 2**20:.1f} |",
                flush=True,
            )
    tokens, heads = SIZES["1.3B"]
    try:
        used = registers(*program(tokens, heads, "forward + backward"))
    except ImportError:
        used = {}
    sizes = Layer("bfloat16", HEAD_DIM, FEATURES, heads, tokens)
    config = gpu_tiles.choose(H100, sizes)
    print(
        "\n| kernel | tokens, warps, stages | shared KiB | our bound | registers | stack | HGMMA |"
    )
    print("|---" * 7 + "|")
    for kernel, bytes_used in shared["1.3B", "forward + backward"].items():
        tiles = getattr(config, kernel)
        bound = gpu_tiles.shared_memory(kernel, tiles, H100, sizes)
        missed |= bytes_used > bound
        print(
            f"| {kernel} | {tiles.tokens}, {tiles.num_warps}, {tiles.num_stages} "
            f"| {bytes_used / 1024:.1f} | {bound / 1024:.1f} | {used.get(kernel, '| | ')} |"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
