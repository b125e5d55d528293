"""What tests/test_parallel_equality.py looks at, computed with 8 devices in a process of its own.

python tests/parallel_cases.py OUT.json
"""

import json
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tiny, two_gpus
from configs import digits
from kernels.linear_attention import FeatureMap
from linvideo_jax import pipeline, turns
from linvideo_jax.loop.states import States
from linvideo_jax.models import wan
from linvideo_jax.models.module import bind, shapes
from linvideo_jax.models.vae import WanVAE
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import pictures, rules
from linvideo_jax.parallel.layout import MeshLayout, layout_of
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe, knobs_at
from linvideo_jax.transfer.samples import Batch

HEADS, BATCH = 4, 8
GRID = (5, 1, 7)  # 35 tokens: 8, 3 and 2 devices have pads
TEACHER = wan.WanConfig(
    num_layers=4, num_attention_heads=HEADS, attention_head_dim=8, ffn_dim=48,
    in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
)  # fmt: skip
MODES = (wan.SOFTMAX, wan.LINEAR, wan.MIX, wan.LINEAR)
# name: (sizes of the mesh, exchange, number of devices, objective); adm comes with remat.
CASES = {
    "data:2, fsdp:4": ({"data": 2, "fsdp": 4}, "auto", 8, "mse"),
    "context:8, ring": ({"context": 8}, "ring", 8, "mse"),
    "data:2, fsdp:2, context:2, ulysses": (
        {"data": 2, "fsdp": 2, "context": 2}, "ulysses", 8, "adm",
    ),
    "context:3, ring": ({"context": 3}, "ring", 3, "mse"),
}  # fmt: skip
STEPS = 5
NO_CLIPPING = 1e9


def settings_of(objective: str):
    """`config.transfer` of configs/digits.py for these few steps."""
    settings = digits.get_config().transfer
    settings.update(
        objective=objective, optimizer="adamw", batch_size=BATCH, target=2, ema_decay=0.9,
        weight_decay=0.01, warmup_steps=0, round_at=10, clip_norm=NO_CLIPPING,
        remat="full" if objective == "adm" else "none",
    )  # fmt: skip
    return settings


def weights(config: wan.WanConfig, rng: np.random.Generator):
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
        shapes(wan.WanTransformer, config),
    )
    for norm in ("norm_q", "norm_k"):
        params["blocks"]["attn1"][norm]["scale"] += 2.0
    return params


def batch(rng: np.random.Generator) -> Batch:
    def draw(*shape):
        return rng.normal(size=(BATCH, *shape)).astype(np.float32)

    latents = (GRID[0], 2 * GRID[1], 2 * GRID[2], 4)
    lengths = (2 + np.arange(BATCH) % 4).astype(np.int32)
    text = draw(6, 16) * (np.arange(6) < lengths[:, None])[..., None]
    t_from = np.linspace(0.3, 0.9, BATCH).astype(np.float32)
    return Batch(draw(*latents), draw(*latents), t_from, 0.8 * t_from, text, lengths)


def distance(ours, theirs) -> float:
    """Of two trees, relative to the norm of the second one; as numbers of double precision."""
    ours, theirs = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(x)] for x in
                    (ours, theirs))  # fmt: skip
    square = sum(np.sum((a - b) ** 2) for a, b in zip(ours, theirs, strict=True))
    return float(np.sqrt(square / sum(np.sum(b**2) for b in theirs)))


def without_dead(params):
    """Without the bias of the text's keys: softmax does not see it, so its gradient is rounding,
    of which Adam makes steps of full size."""
    keys = {k: v for k, v in params["blocks"]["attn2"]["to_k"].items() if k != "bias"}
    attn2 = params["blocks"]["attn2"] | {"to_k": keys}
    return params | {"blocks": params["blocks"] | {"attn2": attn2}}


def moments(optimizer) -> list:
    """Adam's first moments of a state, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(optimizer)
    return [leaf for path, leaf in leaves if "/mu/" in rules.name_of(path)]


def trained(placement: Placement, objective: str, teacher, given: Batch, alone: bool = False):
    """(forward, gradients, losses, params, state) of STEPS updates on one batch.

    The gradients are the first update's, out of Adam's moments. It gives its state's buffers back.
    """
    student = training.student_config(TEACHER)
    settings = settings_of(objective)
    recipe = Recipe.of(
        settings, student, TEACHER, "unipc", "float32", sigmas=(1.0, 0.5, 0.0),
        layout=placement.layout,
    )  # fmt: skip
    teacher = placement.params(teacher)
    state = placement.make(lambda p: training.initial_state(settings, student, p), teacher)
    state = placement.params(state | {"mode": np.array(MODES, np.int32)})
    rows = placement.rows(BATCH)
    given = placement.batch(jax.tree.map(lambda leaf: leaf[rows], given), BATCH)

    @jax.jit
    def look(state, given):
        velocity = training.network(recipe, student, state["params"], state["r"], state["mode"])
        return velocity(given.x, given.t_from, given.text, given.text_lengths)

    # Where tokens are shared; the gradients tell of the others.
    forward = whole(look(state, given)) if placement.mesh.shape["context"] > 1 or alone else None
    grads, losses = None, []
    for step in range(STEPS):
        knobs = knobs_at(settings, step, 1e-3, 2.0, True)
        key = jax.random.fold_in(jax.random.key(0), step)
        before = state
        state, metrics = training.update(recipe, before, teacher, given, knobs, key)
        if step == 0:
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        if grads is None:
            grads = whole(moments(state["optimizer"]))
    return forward, grads, losses, whole(without_dead(state["params"])), state


def equality(out: dict) -> None:
    rng = np.random.default_rng(0)
    teacher, given = weights(TEACHER, rng), batch(rng)
    single = Placement(meshes.make({}, jax.devices()[:1]), None)
    wanted = {name: trained(single, name, teacher, given, True)[:4] for name in ("mse", "adm")}
    for name, (sizes, exchange, count, objective) in CASES.items():
        mesh = meshes.make(sizes, jax.devices()[:count])
        placement = Placement(mesh, layout_of(mesh, HEADS, exchange))
        *ours, state = trained(placement, objective, teacher, given)
        want = rules.shardings(state, mesh)
        apart = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, want)
        largest = max(jax.tree.leaves(state["params"]), key=lambda leaf: leaf.nbytes)
        print(name, round(time.process_time()), "s of CPU", flush=True)
        out[name] = {
            **{
                what: distance(a, b)
                for what, a, b in zip(
                    ("forward", "gradients", "losses", "params"),
                    ours, wanted[objective], strict=True,
                )
                if a is not None
            },
            "as_the_table_says": all(jax.tree.leaves(apart)),
            "largest_shard": largest.addressable_shards[0].data.nbytes / largest.nbytes,
        }  # fmt: skip
        if objective == "adm":
            restored(out, state)


def restored(out: dict, state) -> None:
    """A state that one mesh saved, on another mesh and on one device."""
    with tempfile.TemporaryDirectory() as folder:
        with States(Path(folder), state, None, 1) as states:
            states.save(1, state, {}, {})
        elsewhere = rules.shardings(state, meshes.make({"fsdp": 4}))
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        for name, shardings in (
            ("mesh", elsewhere),
            ("device", jax.tree.map(lambda _: alone, state)),
        ):
            like = jax.tree.map(
                lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
                state, shardings,
            )  # fmt: skip
            with States(Path(folder), like, None, 1) as states:
                again, _ = states.restore(1)
            same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), again, state)
            there = jax.tree.map(lambda leaf, at: leaf.sharding == at, again, shardings)
            out[f"restored on another {name}"] = all(jax.tree.leaves((same, there)))


def collectives(text: str) -> dict[str, int]:
    """Bytes of float arrays that each kind of collective of an HLO text gives, in one pass."""
    sizes = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shape, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"(f32|bf16|f16)\[([\d,]*)\]", shape):
            size = int(np.prod([int(n) for n in dims.split(",") if n]))
            sizes[kind] = sizes.get(kind, 0) + size * (4 if dtype == "f32" else 2)
    return sizes


def exchanges(out: dict) -> None:
    """What one attention layer's forward and backward pass sends, at two numbers of tokens."""
    mesh = meshes.make({"context": 4}, jax.devices()[:4])
    maps = jax.tree.map(jnp.asarray, wan.initial_feature_map(replace(TEACHER, num_layers=1)))
    maps = {name: value[0] for name, value in maps.items()}
    for name, exchange in (("linear", "ring"), ("ulysses", "ulysses"), ("ring", "ring")):
        for tokens in (62, 254):  # with pads
            layout = MeshLayout(mesh, exchange).for_tokens(tokens)

            def loss(q, k, v, maps, layout=layout, name=name):
                if name == "linear":
                    y = layout.linear_attention(q, k, v, FeatureMap(**maps))
                else:
                    y = layout.softmax_attention(q, k, v)
                return jnp.sum(y**2)

            shared = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
            x = (1, tokens + -tokens % 4, HEADS, 8)
            x = jax.ShapeDtypeStruct(x, jnp.float32, sharding=shared)
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, maps).compile()
            out[f"{name} {tokens}"] = collectives(compiled.as_text())


def sampling(out: dict) -> None:
    """Latents and videos of one prompt and of three, on one device and on meshes."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = turns.open_folder(tiny.write_teacher(Path(folder) / "teacher"))
        settings = pipeline.Settings.of(checkpoint)
        prompts, seeds = ["a red 3", "a blue 7", "the white two"], [5, 6, 7]
        alone = pipeline.Pipeline(checkpoint)
        wanted = alone.latents(prompts, seeds, settings, 1)
        video = alone.decode(wanted[:1]).astype(int)
        for sizes, batch_size, count in (({"context": 4}, 1, 1), ({"data": 4, "fsdp": 2}, 8, 3)):
            ours = pipeline.Pipeline(checkpoint, placement=Placement.by_sizes(sizes, 2))
            latents = ours.latents(prompts[:count], seeds[:count], settings, batch_size)
            out[f"latents on {sizes}"] = distance(latents, wanted[:count])
        out["noise in pixels"] = int(np.abs(ours.decode(wanted[:1]).astype(int) - video).max())
        out["spread of pixels"] = float(np.std(video))
        params = ours._turns.params("vae")
        parts = pictures.placed(jnp.asarray(wanted[:1]), params, meshes.make({}))
        decoded = bind(WanVAE, checkpoint.vae_config, parts[1]).decode_chunks(parts[0])
        out["share of a video"] = decoded.addressable_shards[0].data.size / decoded.size


def two_devices(out: dict) -> None:
    """Parts of benchmarks/two_gpus.py at small size."""
    benchmark = two_gpus.Benchmark(small=True, rounds=1, blocks=2)
    out["two_gpus"] = {"bytes": benchmark.exchanged(), "equality": benchmark.equality()}


def main(path: str) -> None:
    out = {}
    for part in (sampling, exchanges, two_devices, equality):
        part(out)
        Path(path).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main(sys.argv[1])
