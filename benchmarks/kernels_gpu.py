"""Attention layers of Wan2.1's sizes on this machine's GPU: times against the limit of bytes.

python benchmarks/kernels_gpu.py --out=runs/kernels_gpu.json

Forward, and forward + backward, of one layer in bfloat16, batch 1: our kernels, plain JAX, PyTorch
with torch.compile, public kernels where their packages are installed, and softmax attention by
cuDNN and tokamax; then the whole 1.3B transformer with all layers linear, by plain JAX and by our
kernels. Repeats are interleaved: each round times every candidate once. A result is in the file
as soon as a group is done, and a group in the file is not measured again on the same device.

--small    tiny sizes, to try the program on a CPU
--only     names of groups, with commas: 1.3B forward, 1.3B forward + backward, ..., transformer
--profile  runs our kernels a few times and times nothing, for Nsight Compute:
           ncu --set full -k "regex:state|apply|query_backward" --launch-skip 10 -c 5
               -o kernels python benchmarks/kernels_gpu.py --profile
           It then says bytes from DRAM (dram__bytes.sum), the tensor cores' share
           (sm__inst_executed_pipe_tensor.sum, sm__pipe_tensor_cycles_active) and the stalls.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import timing
import torch_layers
from absl import flags

from kernels.linear_attention import FeatureMap, interface, linear_attention
from kernels.softmax_attention import softmax_attention
from linvideo_jax import command_line
from linvideo_jax.errors import UserError
from linvideo_jax.loop import read_json, write_json
from linvideo_jax.models import module, wan

LAYERS = {"1.3B": (32_760, 12, 128), "14B": (75_600, 40, 128)}  # tokens, heads, head_dim
SMALL_LAYERS = {"small": (300, 2, 32)}
DIRECTIONS = ("forward", "forward + backward")
# Arrays of tokens: q, k, v, out; then q, k, v, dout read and dq, dk, dv written.
LEAST_ARRAYS = {"forward": 4, "forward + backward": 11}
GOALS_MS = {
    ("1.3B", "forward"): 0.20,
    ("1.3B", "forward + backward"): 0.70,
    ("14B", "forward"): 1.5,
    ("14B", "forward + backward"): 5.2,
}
MEMORY_GOAL = 64 * 2**20  # beside inputs and output of a forward pass

OURS = "linear, our kernels"
JAX_LAYERS = {
    OURS: lambda q, k, v, maps: linear_attention(q, k, v, maps, implementation="pallas_gpu"),
    "linear, plain JAX": lambda q, k, v, maps: linear_attention(
        q, k, v, maps, implementation="reference"
    ),
    "softmax, cuDNN": lambda q, k, v, maps: softmax_attention(q, k, v, implementation="cudnn"),
    "softmax, tokamax": lambda q, k, v, maps: softmax_attention(q, k, v, implementation="tokamax"),
}


class Candidate:
    """Something to time: `sample()` gives seconds of one call."""

    def __init__(self, sample: Callable[[], float], temporary: int | None = None):
        self.sample, self.temporary = sample, temporary


def jax_candidate(function: Callable[..., Any], direction: str, inputs: Any) -> Candidate:
    """Raises NotImplementedError if the implementation refuses."""
    if direction == "forward":
        run, args = function, inputs[:4]
    else:

        def run(q, k, v, maps, cotangent):
            out, pull = jax.vjp(function, q, k, v, maps)
            return out, pull(cotangent)

        args = inputs
    compiled = jax.jit(run).lower(*args).compile()
    calls = timing.warm(compiled, *args)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Candidate(lambda: timing.seconds(compiled, args, calls), temporary)


def random_inputs(tokens: int, heads: int, head_dim: int) -> tuple[Any, ...]:
    """q, k, v, the maps, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v, cotangent = (
        jax.random.normal(key, (1, tokens, heads, head_dim), jnp.bfloat16) for key in keys[:4]
    )
    weights = (
        jax.random.normal(key, (heads, head_dim, head_dim // 2)) / head_dim**0.5 for key in keys[4:]
    )
    return q, k, v, FeatureMap(*weights), cotangent


def linear_flops(tokens: int, heads: int, head_dim: int, direction: str) -> int:
    """Matrix products of the least work: features of one sign give the other.

    Forward: projections of q and k, the state, the output. Backward: projections again, G, dphi,
    dv, dS, and from the logits dq, dk and both dW.
    """
    products = {"forward": 2 * 0.5 + 2, "forward + backward": 2 * 0.5 + 2 + 2 * 0.5 + 4 + 4 * 0.5}
    return round(products[direction] * 2 * tokens * heads * head_dim * head_dim)


def measure_layer(
    layer: str, sizes: tuple[int, int, int], direction: str, repeats: int, words: Sequence[str]
) -> dict:
    """One group of rows: every candidate whose name has one of the words, interleaved."""
    inputs = random_inputs(*sizes)
    builders = {
        name: lambda function=function: jax_candidate(function, direction, inputs)
        for name, function in JAX_LAYERS.items()
    }
    for name, build in torch_layers.LAYERS.items():
        builders[name] = lambda build=build: Candidate(build(*sizes, direction))
    rows, candidates = {}, {}
    for name, build in builders.items():
        if not any(word in name for word in words):
            continue
        print(f"  {name}: compiling", flush=True)
        try:
            candidates[name] = build()
        # Other people's packages fail in their own ways; the row says how.
        except Exception as error:
            rows[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    samples = {name: [] for name in candidates}
    for done in range(repeats):
        for name, candidate in candidates.items():
            samples[name].append(candidate.sample())
        print(f"  {done + 1} of {repeats} rounds", flush=True)
    tokens, heads, head_dim = sizes
    least = LEAST_ARRAYS[direction] * 2 * tokens * heads * head_dim
    for name, candidate in candidates.items():
        row = timing.summary(samples[name])
        linear = name.startswith("linear")
        flops = linear_flops(*sizes, direction)
        if not linear:
            flops = 4 * tokens**2 * heads * head_dim * (1 if direction == "forward" else 3.5)
        row["tflops"] = flops / row["ms"] / 1e9
        row["least_bytes"] = least
        row["temporary_bytes"] = candidate.temporary
        rows[name] = row
    return {"rows": rows, "goal_ms": GOALS_MS.get((layer, direction))}


def measure_transformer(small: bool, repeats: int) -> dict:
    """The 1.3B model's forward at 480p, all layers linear, by plain JAX and by our kernels."""
    config = wan.WanConfig(feature_map="hedgehog")
    latent = (1, 21, 60, 104, 16)
    if small:
        config = wan.WanConfig(
            num_attention_heads=2, ffn_dim=64, num_layers=2, text_dim=32, feature_map="hedgehog"
        )
        latent = (1, 2, 8, 8, 16)
    params = jax.jit(lambda: module.init(wan.WanTransformer, config))()
    key = jax.random.key(1)
    latents = jax.random.normal(key, latent)
    text = jax.random.normal(key, (1, wan.TEXT_TOKENS, config.text_dim))
    modes = jnp.full(config.num_layers, wan.LINEAR)

    def candidate(names):
        def run(params, latents, text):
            model = module.bind(wan.WanTransformer, config, params)
            timestep = jnp.full(1, 500.0)
            return model(latents, timestep, text, None, mode=modes, dtype=jnp.bfloat16)

        chosen = {name: interface.IMPLEMENTATIONS[name] for name in names}
        jax.clear_caches()  # else the model's branches keep what they chose when first traced
        with mock.patch.dict(interface.IMPLEMENTATIONS, chosen, clear=True):
            return jax_candidate(
                lambda params, latents, text, _: run(params, latents, text),
                "forward",
                (params, latents, text, None),
            )

    rows, candidates = {}, {}
    for name, names in (("plain JAX", ("reference",)), ("our kernels", ("pallas_gpu",))):
        print(f"  transformer, {name}: compiling", flush=True)
        try:
            candidates[name] = candidate(names)
        except NotImplementedError as error:
            rows[name] = {"missing": str(error)}
    samples = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, one in candidates.items():
            samples[name].append(one.sample())
    for name in candidates:
        rows[name] = timing.summary(samples[name])
        rows[name]["temporary_bytes"] = candidates[name].temporary
    return {"rows": rows, "goal_ms": None}


def table(results: dict) -> str:
    """The results as Markdown."""
    bandwidth = results["bandwidth"]
    lines = [
        f"{results['device']}, JAX {results['jax']}, copies at {bandwidth / 1e12:.2f} TB/s",
        "",
        "| group | what | ms (quartiles) | TFLOP/s | least MiB | of the byte limit "
        "| temporary MiB | goal ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, result in results["groups"].items():
        goal = result["goal_ms"] or ""
        for name, row in result["rows"].items():
            if "missing" in row:
                lines.append(f"| {group} | {name} | {row['missing']} | | | | | |")
                continue
            low, high = row["quartiles"]
            cells = [group, name, f"{row['ms']:.3f} ({low:.3f} to {high:.3f})"]
            if "least_bytes" in row:
                limit = 1e3 * row["least_bytes"] / bandwidth
                cells += [f"{row['tflops']:.1f}", f"{row['least_bytes'] / 2**20:.0f}"]
                cells.append(f"{row['ms'] / limit:.2f}")
            else:
                cells += ["", "", ""]
            memory = row["temporary_bytes"]
            cells.append("" if memory is None else f"{memory / 2**20:.1f}")
            cells.append(str(goal) if name == OURS else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def program(argv: Sequence[str]) -> None:
    values = command_line.define(
        {
            "out": ("runs/kernels_gpu.json", "file of the results"),
            "only": ("", "names of groups to measure, with commas"),
            "rows": ("", "words, with commas, of which a row's name has one; none: all rows"),
        }
    )
    flags.DEFINE_bool("small", False, "tiny sizes, to try the program", flag_values=values)
    flags.DEFINE_bool("profile", False, "run our kernels, time nothing", flag_values=values)
    flags.DEFINE_integer("repeats", 20, "rounds", lower_bound=1, flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    layers = SMALL_LAYERS if given["small"] else LAYERS
    groups = {
        f"{layer} {direction}": (
            lambda layer=layer, sizes=sizes, direction=direction: measure_layer(
                layer, sizes, direction, given["repeats"], given["rows"].split(",")
            )
        )
        for layer, sizes in layers.items()
        for direction in DIRECTIONS
    }
    groups["transformer"] = lambda: measure_transformer(given["small"], given["repeats"])
    only = [name.strip() for name in given["only"].split(",") if name.strip()] or list(groups)
    for name in only:
        command_line.choice("only", name, list(groups))
    if given["profile"]:
        profile(layers)
        return
    out = Path(given["out"])
    results = read_json(out) if out.exists() else {}
    about = timing.device()
    if results and any(results.get(name) != value for name, value in about.items()):
        raise UserError(f"{out} is of another device or JAX: give another --out.")
    if not results:
        results = {**about, "groups": {}}
        results["bandwidth"] = timing.copy_bandwidth(8 if given["small"] else 1024)
    for group, measure in groups.items():
        if group in results["groups"] or group not in only:
            continue
        print(group, flush=True)
        results["groups"][group] = measure()
        write_json(out, results)
    print(table(results))


def profile(layers: dict[str, tuple[int, int, int]]) -> None:
    for sizes in layers.values():
        inputs = random_inputs(*sizes)
        for direction in DIRECTIONS:
            jax_candidate(JAX_LAYERS[OURS], direction, inputs).sample()
            print(f"{sizes}, {direction}: done", flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
