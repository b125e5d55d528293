"""Two GPUs of one host through NCCL: whether the sharded code is right there, and how fast.

python benchmarks/two_gpus.py --out=runs/two_gpus.json
python benchmarks/two_gpus.py --out=runs/two_gpus.json --parts=speed_14b,bytes
JAX_PLATFORMS=cpu NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    python benchmarks/two_gpus.py --small --out=runs/two_small.json

Random weights of true size on the first two GPUs. Each part is measured once, in a process of its
own, and written to --out at once; the table is printed at the end, and written beside --out as
.md. The parts, in the order of what they are worth:

equality     forward of 1.3B, LinVideo's share linear, tokens on both GPUs by Ulysses and by ring,
             against one GPU; bfloat16's own error is that of one GPU against float32
speed_14b    one forward on one GPU and on two: dense, LinVideo's share and all linear, and from a
             profile what collectives take
train_fsdp   an update of 1.3B with ADM, weights and samples on both GPUs
speed_1.3b   as speed_14b
bytes        what the compiled programs of both sizes exchange, against the formulas
gradients    of an update with ADM of a few blocks, on fsdp:2 and data:2 against one GPU
train_one    as train_fsdp, on one GPU with one sample
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import contenders, hot_kernels, latency, measure, scaling, two_gpus_table
from configs import smoke as smoke_config
from linvideo_jax import command_line, rehearsal
from linvideo_jax.errors import UserError
from linvideo_jax.metrics import flops
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.placement import Placement
from linvideo_jax.plan import collectives
from linvideo_jax.stages import smoke
from linvideo_jax.transfer import samples, training
from linvideo_jax.transfer.recipe import knobs_at

FLAGS = {
    "out": (None, "JSON file of the results"),
    "parts": (None, "what to measure; default everything"),
}
PARTS = ("equality", "speed_14b", "train_fsdp", "speed_1.3b", "bytes", "gradients", "train_one")
# Kernels of a CUDA graph may have no names in a profile. Off for all parts and rows alike.
NAMED_KERNELS = "--xla_gpu_enable_command_buffer="


class Benchmark:
    """The parts as methods without arguments that return figures."""

    def __init__(self, small: bool, rounds: int, blocks: int):
        self.small, self.rounds, self.blocks = small, rounds, blocks
        self.dtype = jnp.dtype(jnp.bfloat16)
        self.sizes = latency.Benchmark(small, rounds, 1, None).sizes

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All parts by name."""
        return {
            "equality": self.equality,
            "speed_14b": partial(self.speed, "14b", max(1, self.rounds // 3)),
            "train_fsdp": partial(self.train, 2),
            "speed_1.3b": partial(self.speed, "1.3b", self.rounds),
            "bytes": self.exchanged,
            "gradients": self.gradients,
            "train_one": partial(self.train, 1),
        }

    def equality(self) -> dict[str, Any]:
        """Relative L2 errors of velocities."""
        size = self.sizes["1.3b"]
        config = size.models.transformer
        places = {
            "one GPU": on(1, {}, config),
            "Ulysses": on(2, {"context": 2}, config, "ulysses"),
            "ring": on(2, {"context": 2}, config, "ring"),
        }
        ours = contenders.Ours(config, self.dtype)
        exact = contenders.Ours(config, jnp.dtype(jnp.float32), _wide(ours.params))
        mode = ours.mode(size.rows()["LinVideo"])
        inputs = {name: placed(place, ours, size, mode) for name, place in places.items()}
        lowered = {name: lower(ours, places[name], given) for name, given in inputs.items()}
        with jax.default_matmul_precision("highest"):
            inputs["float32"] = placed(places["one GPU"], exact, size, mode)
            lowered["float32"] = lower(exact, places["one GPU"], inputs["float32"])
        programs = compiled(lowered)
        found = {}
        for name, program in programs.items():
            found[name] = np.asarray(program(*inputs[name]))
            print(f"  {name} ran", flush=True)

        def errors(names, wanted):
            return {name: measure.relative_error(found[name], found[wanted]) for name in names}

        return size.about() | {
            "to_float32": errors(found, "float32"),
            "to_one": errors(("Ulysses", "ring"), "one GPU"),
        }

    def speed(self, name: str, rounds: int) -> dict[str, Any]:
        """Seconds of one forward on one and on two GPUs, taking turns, and the collectives."""
        size = self.sizes[name]
        config = size.models.transformer
        places = {"one": on(1, {}, config), "two": on(2, {"context": 2}, config)}
        ours = contenders.Ours(config, self.dtype)
        rows = {row: layers or () for row, layers in size.rows().items()}
        inputs = {key: placed(place, ours, size, ours.mode(())) for key, place in places.items()}
        programs = compiled({key: lower(ours, places[key], inputs[key]) for key in places})
        runs = {}
        for row, layers in rows.items():
            for key, place in places.items():
                given = *inputs[key][:-1], place.everywhere(ours.mode(layers))
                runs[f"{row}, {key}"] = partial(measure.ready, programs[key], *given)
        for key in places:
            runs[f"LinVideo, {key}"]()  # to warm up: it runs both kinds of layers
        print("  warm", flush=True)
        timed = measure.interleaved(runs, rounds, warm_up=False)
        print("  timed", flush=True)
        figures = {}
        for row, layers in rows.items():
            one, two = (timed[f"{row}, {key}"] for key in ("one", "two"))
            operations = flops.forward(ours.config, size.tokens, layers)
            figures[row] = {
                "one": one | {"tflop_per_second": operations / one["seconds"] / 1e12},
                "two": two | {"tflop_per_second": operations / two["seconds"] / 1e12},
                "speed_up": one["seconds"] / two["seconds"],
                "collectives": _profiled(runs[f"{row}, two"]),
            }
        memory = {key: measure.program_bytes(program) for key, program in programs.items()}
        return size.about() | {
            "exchange": places["two"].layout.exchange,
            "program_bytes": memory,
            "rows": figures,
        }

    def exchanged(self) -> dict[str, Any]:
        """Bytes that a GPU sends: of the compiled programs' collectives, and by formula.

        These are the programs of `equality` and `speed`, so on disk if those ran before.
        """
        lowered, of = {}, {}
        for name, way in (("1.3b", "Ulysses"), ("1.3b", "ring"), ("14b", "Ulysses")):
            size = self.sizes[name]
            place = on(2, {"context": 2}, size.models.transformer, way.lower())
            ours, inputs = described(place, size, self.dtype)
            lowered[name, way] = lower(ours, place, inputs)
            of[name, way] = size, ours.config
        layers, forwards = {}, {}
        for key, program in compiled(lowered).items():
            size, config = of[key]
            sent = attention_bytes(program.as_text(), config.num_layers)
            forwards[f"{size.name}, {key[1]}"] = sent["rest"]
            for way, kind in ((key[1], "softmax"), ("linear", "linear")):
                layers[f"{size.name}, {way}"] = {
                    "tokens": size.tokens,
                    "kinds": sent[kind],
                    "measured": sum(sent[kind].values()),
                    "formula": scaling.sent(way, config, size.tokens, 2),
                }
        return {"layers": layers, "rest_of_a_forward": forwards}

    def gradients(self) -> dict[str, Any]:
        """Relative L2 errors of the gradients of weights, feature maps and scores."""
        places = {"one GPU": {}, "fsdp:2": {"fsdp": 2}, "data:2": {"data": 2}}
        config = _smoke_config(self.small, 2)
        config.transfer.target = self.blocks // 2
        problem = rehearsal.problem(config)
        fewer = replace(problem.models.transformer, num_layers=self.blocks)
        problem = replace(problem, models=replace(problem.models, transformer=fewer))
        weights = measure.random_params(WanTransformer, fewer, jnp.float32)
        rng = np.random.default_rng(0)
        lowered, inputs, batch = {}, {}, None
        for name, sizes in (places | {"float32": {}}).items():
            place = on(2 if sizes else 1, sizes, fewer)
            config.dtype = "float32" if name == "float32" else "bfloat16"
            recipe = rehearsal.recipe(config, problem, place.mesh)
            if batch is None:
                batch = rehearsal.batch(config, recipe, problem, rng)
            state = training.initial_state(config.transfer, recipe.student, weights)
            state = {key: state[key] for key in ("params", "r", "mode")}
            knobs = knobs_at(config.transfer, config.transfer.warmup_steps, 1e-5, 1.0, True)
            inputs[name] = (
                place.params(state),
                place.params(training.frozen(weights, recipe.dtype)),
                place.batch(batch, 2),
                knobs,
            )
            precision = "highest" if name == "float32" else None
            with jax.default_matmul_precision(precision):
                lowered[name] = jax.jit(partial(_gradients, recipe)).lower(*inputs[name])
        found = {}
        for name, program in compiled(lowered).items():
            made = program(*inputs.pop(name))
            found[name] = jax.device_put(made, jax.devices()[0])
            print(f"  {name} ran", flush=True)
        one = found["one GPU"]
        return {
            "blocks": self.blocks,
            "tokens": problem.size.tokens,
            "to_float32": by_group(one, found["float32"]),
            "to_one": {name: by_group(found[name], one) for name in ("fsdp:2", "data:2")},
        }

    def train(self, count: int) -> dict[str, Any]:
        """An update with ADM, every layer mixed, of one sample for each GPU."""
        config = _smoke_config(self.small, count)
        return smoke.measure(config, 3, devices=jax.devices()[:count])


def on(count: int, sizes: Mapping[str, int], config: Any, exchange: str = "auto") -> Placement:
    """The first GPUs as a mesh, for a transformer."""
    heads, devices = config.num_attention_heads, jax.devices()[:count]
    return Placement.by_sizes(sizes, heads, exchange, devices)


def placed(place: Placement, ours: contenders.Ours, size: latency.Size, mode) -> tuple[Any, ...]:
    """The arguments of `contenders.velocity` as sample.py has them: weights by the table."""
    params, *rest = ours.inputs(size.shape)
    return place.params(params), *place.everywhere((*rest, mode))


def described(place: Placement, size: latency.Size, dtype) -> tuple[contenders.Ours, tuple]:
    """(ours, arguments) as `placed`, of ShapeDtypeStructs: nothing is computed."""
    config = size.models.transformer
    params = jax.eval_shape(lambda: contenders.Ours(config, dtype).params)
    ours = contenders.Ours(config, dtype, params)

    def rest(params):
        ours = contenders.Ours(config, dtype, params)
        return *ours.inputs(size.shape)[1:], jnp.asarray(ours.mode(()))

    def at(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    everywhere = meshes.replicated(place.mesh)
    others = jax.tree.map(lambda leaf: at(leaf, everywhere), jax.eval_shape(rest, params))
    return ours, (jax.tree.map(at, params, rules.shardings(params, place.mesh)), *others)


def lower(ours: contenders.Ours, place: Placement, inputs: Sequence[Any]) -> jax.stages.Lowered:
    """One forward, traced."""
    options = {"config": ours.config, "dtype": ours.dtype, "layout": place.layout}
    return contenders.velocity.lower(*inputs, **options)


def compiled(lowered: Mapping[Any, jax.stages.Lowered]) -> dict[Any, jax.stages.Compiled]:
    """All programs, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        programs = pool.map(lambda one: one.compile(), lowered.values())
        programs = dict(zip(lowered, programs, strict=True))
    print(f"  {len(programs)} programs compiled", flush=True)
    return programs


def attention_bytes(text: str, num_layers: int) -> dict[str, dict[str, float]]:
    """Bytes by kind of collective that a GPU sends, of a forward's program in XLA's text.

    softmax, linear: in one such layer alone; rest: in the whole forward, whatever the layers, above
    all for the weights.
    """
    softmax, linear = (
        {kind: sent for kind, (_, sent) in collectives.count(text, 2, taken).by_kind().items()}
        for taken in ((1, 0, 0), (0, 1, 0))
    )
    rest = {kind: min(sent, linear[kind]) for kind, sent in softmax.items() if kind in linear}

    def own(sent):
        more = {kind: (value - rest.get(kind, 0)) / num_layers for kind, value in sent.items()}
        return {kind: value for kind, value in more.items() if value > 0}

    return {"softmax": own(softmax), "linear": own(linear), "rest": rest}


def by_group(ours: Any, theirs: Any) -> dict[str, float]:
    """Relative L2 distance of gradients: weights, feature maps, scores."""
    sums = {group: np.zeros(2) for group in ("weights", "feature maps", "scores")}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        name = rules.name_of(path)
        group = "feature maps" if "feature_map" in name else "weights"
        sums["scores" if name == "r" else group] += np.asarray(_squares(a, b), np.float64)
    return {group: float(np.sqrt(apart / whole)) for group, (apart, whole) in sums.items()}


@jax.jit
def _squares(a, b):
    return jnp.sum(jnp.square(a - b)), jnp.sum(jnp.square(b))


def _gradients(recipe, state, teacher, batch, knobs):
    batch = samples.wide(batch)
    return training.gradients(recipe, state, teacher, batch, None, knobs)[0]


def _smoke_config(small: bool, batch_size: int):
    config = smoke_config.get_config()
    config.model = "wan_digits" if small else "wan2_1_t2v_1_3b"
    config.transfer.batch_size = batch_size
    config.mesh.fsdp = batch_size
    return config


def _wide(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def _profiled(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Of each GPU; none where the profiler fails, so that what was timed is not lost."""
    try:
        return hot_kernels.collectives(run)
    except (jax.errors.JaxRuntimeError, OSError, ValueError) as error:
        print(f"  no profile: {error}", flush=True)
        return []


def _write(out: Path, small: bool) -> None:
    if not measure.is_part():
        two_gpus_table.write(measure.Results(out, small).everything, out)


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(FLAGS)
    define = {"flag_values": values}
    flags.DEFINE_bool("small", False, "tiny networks, on any two devices", **define)
    flags.DEFINE_integer("rounds", 5, "how often 1.3B is timed; 14B a third of it", 1, **define)
    flags.DEFINE_integer("blocks", 4, "of 1.3B's 30, for the gradients", 2, 30, **define)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "out")
    wanted = (given["parts"] or ",".join(PARTS)).split(",")
    for part in wanted:
        command_line.choice("parts", part, PARTS)
    if jax.device_count() < 2:
        raise UserError(
            f"two devices are needed, and {jax.device_count()} {jax.devices()[0].device_kind} is "
            "here: on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=2 and NPROC=32."
        )
    out = Path(given["out"])
    results = measure.Results(out, values.small)
    benchmark = Benchmark(values.small, values.rounds, values.blocks)
    try:
        measure.run_parts(benchmark.parts(), wanted, results, measure.command(__file__, argv))
    except SystemExit:  # a part failed: the table says why
        _write(out, values.small)
        raise
    _write(out, values.small)


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on with the parts that lack")


if __name__ == "__main__":
    if NAMED_KERNELS not in os.environ.get("XLA_FLAGS", ""):  # children have it already
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NAMED_KERNELS}".strip()
    sys.exit(main(sys.argv))
