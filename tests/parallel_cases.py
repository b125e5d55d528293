"""What tests/test_parallel_equality.py looks at, computed with 8 devices in a process of its own.

python tests/parallel_cases.py OUT.json
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from kernels.linear_attention import FeatureMap
from linvideo_jax.models import wan
from linvideo_jax.models.module import bind, shapes
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import pictures, rules
from linvideo_jax.parallel.layout import MeshLayout, layout_of
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe, knobs_at
from linvideo_jax.transfer.samples import Batch

HEADS, BATCH = 4, 8
GRID = (3, 3, 5)  # 45 tokens: 8, 4, 3 and 2 devices have pads, or none
TEACHER = wan.WanConfig(
    num_layers=4, num_attention_heads=HEADS, attention_head_dim=8, ffn_dim=48,
    in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
)  # fmt: skip
MODES = (wan.SOFTMAX, wan.LINEAR, wan.MIX, wan.LINEAR)
# name: (sizes of the mesh, exchange, number of devices, objective)
CASES = {
    "data:8": ({"data": 8}, "auto", 8, "mse"),
    "fsdp:8": ({"fsdp": 8}, "auto", 8, "adm"),
    "context:8, ring": ({"context": 8}, "ring", 8, "mse"),
    "data:2, fsdp:2, context:2, ulysses": (
        {"data": 2, "fsdp": 2, "context": 2}, "ulysses", 8, "adm",
    ),
    "context:3, ring, uneven": ({"context": 3}, "ring", 3, "mse"),
    "fsdp:2, context:4, ulysses, uneven": ({"fsdp": 2, "context": 4}, "ulysses", 8, "mse"),
}  # fmt: skip
STEPS = 5


def settings_of(objective: str):
    """`config.transfer` of configs/digits.py for these few steps."""
    settings = digits.get_config().transfer
    settings.update(
        objective=objective, optimizer="adamw", batch_size=BATCH, target=2, ema_decay=0.9,
        weight_decay=0.01, warmup_steps=0, round_at=10, remat="full",
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


def trained(placement: Placement, objective: str, teacher, given: Batch):
    """(forward, gradients, losses, params, state) of STEPS updates on one batch."""
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
        forward = velocity(given.x, given.t_from, given.text, given.text_lengths)
        knobs = knobs_at(settings, 0, 1e-3, 2.0, True)
        return forward, training.gradients(recipe, state, teacher, given, None, knobs)[0]

    forward, grads = whole(look(state, given))
    losses = []
    for step in range(STEPS):
        knobs = knobs_at(settings, step, 1e-3, 2.0, True)
        key = jax.random.fold_in(jax.random.key(0), step)
        state, metrics = training.update(recipe, state, teacher, given, knobs, key)
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return forward, grads, losses, whole(without_dead(state["params"])), state


def equality(out: dict) -> None:
    rng = np.random.default_rng(0)
    teacher, given = weights(TEACHER, rng), batch(rng)
    single = Placement(meshes.make({}, jax.devices()[:1]), None)
    wanted = {name: trained(single, name, teacher, given)[:4] for name in ("mse", "adm")}
    for name, (sizes, exchange, count, objective) in CASES.items():
        mesh = meshes.make(sizes, jax.devices()[:count])
        placement = Placement(mesh, layout_of(mesh, HEADS, exchange))
        *ours, state = trained(placement, objective, teacher, given)
        want = rules.shardings(state, mesh)
        apart = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, want)
        largest = max(jax.tree.leaves(state["params"]), key=lambda leaf: leaf.nbytes)
        out[name] = {
            **{
                what: distance(a, b)
                for what, a, b in zip(
                    ("forward", "gradients", "losses", "params"),
                    ours, wanted[objective], strict=True,
                )
            },
            "as_the_table_says": all(jax.tree.leaves(apart)),
            "largest_shard": largest.addressable_shards[0].data.nbytes / largest.nbytes,
        }  # fmt: skip


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
                q, k, v = (layout.enter(x, axis=1) for x in (q, k, v))
                if name == "linear":
                    y = layout.linear_attention(q, k, v, FeatureMap(**maps))
                else:
                    y = layout.softmax_attention(q, k, v)
                return jnp.sum(y**2)

            x = jax.ShapeDtypeStruct((1, tokens, HEADS, 8), jnp.float32)
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, maps).compile()
            out[f"{name} {tokens}"] = collectives(compiled.as_text())


def vae(out: dict) -> None:
    config = VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,),
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(leaf.dtype),
        shapes(WanVAE, config),
    )
    latents = jnp.asarray(rng.normal(size=(1, 3, 6, 8, 4)).astype(np.float32))
    wanted = bind(WanVAE, config, params).decode_chunks(latents)
    mesh = meshes.make({"context": 8})
    parts = pictures.sharding(mesh, 1, 6, 8)
    placed = rules.place(params, mesh)
    video = bind(WanVAE, config, placed).decode_chunks(jax.device_put(latents, parts))
    shard = video.addressable_shards[0].data
    out["vae"] = {"largest": float(jnp.max(jnp.abs(np.asarray(video) - np.asarray(wanted)))),
                  "share": shard.size / video.size, "spread": float(jnp.std(wanted))}  # fmt: skip


def main(path: str) -> None:
    out = {}
    for part in (equality, exchanges, vae):
        part(out)
        Path(path).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main(sys.argv[1])
