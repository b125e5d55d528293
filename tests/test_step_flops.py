"""FLOPs of updates by formula against those of every product in the traced update, and XLA's."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from kernels.softmax_attention import blocks, interface, reference
from linvideo_jax import config_files, rehearsal
from linvideo_jax.metrics import flops, step_flops
from linvideo_jax.metrics.step_flops import Layers, Size
from linvideo_jax.models import registry, wan
from linvideo_jax.models.module import bind, shapes
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.plan import stages
from linvideo_jax.transfer import training

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 256,
    "text_dim": 64,
    "freq_dim": 64,
}
_NESTED = (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)


def products(jaxpr) -> float:
    """FLOPs of all dot products, loops times their length, of the costliest branch."""
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        values = (v if isinstance(v, tuple) else (v,) for v in equation.params.values())
        inside = [products(v) for group in values for v in group if isinstance(v, _NESTED)]
        match equation.primitive.name:
            case "scan":
                total += equation.params["length"] * inside[0]
            case "cond":
                total += max(inside)
            case _:
                total += sum(inside)
    return total


def as_kernels_do(q, k, v, bias):
    """Softmax attention that keeps no logits: the backward pass makes them again."""
    return reference.softmax_attention(q, k, v, bias) if bias is not None else fused(q, k, v)


@jax.custom_vjp
def fused(q, k, v):
    return blocks.attend(q, k, v).out.astype(q.dtype)


def _forward(q, k, v):
    block = blocks.attend(q, k, v)
    return block.out.astype(q.dtype), (q, k, v, block)


def _backward(saved, dout):
    changes = blocks.gradients(*saved, dout)
    return tuple(change.astype(x.dtype) for change, x in zip(changes, saved[:3], strict=True))


fused.defvjp(_forward, _backward)


@pytest.fixture
def planned(monkeypatch):
    """planned(objective=, remat=) -> (config, problem, recipe, mesh): 3 layers, 1,008 tokens."""
    models = registry.wan_digits()
    tiny = registry.ModelSizes(WanConfig(num_layers=3, **SIZES), models.vae, models.text_encoder)
    monkeypatch.setitem(registry.MODELS, "tiny", lambda: tiny)
    monkeypatch.setitem(interface.IMPLEMENTATIONS, "reference", as_kernels_do)

    def planned(**changes):
        config = config_files.load("configs/digits.py")
        config.model = "tiny"
        config.evaluate.height = config.evaluate.width = 192
        config.transfer.update({"batch_size": 2, "optimizer": "adamw", **changes})
        given = rehearsal.problem(config)
        mesh = AbstractMesh((1,) * len(meshes.AXES), meshes.AXES)
        return config, given, rehearsal.recipe(config, given, mesh), mesh

    return planned


@pytest.mark.parametrize(
    ("objective", "remat"),
    [
        ("adm", "none"),
        ("adm", "products"),
        ("adm", "full"),
        ("mse", "full"),
        ("own_points", "full"),
        ("adm_score", "full"),
        ("dmd", "products"),
    ],
)
def test_an_update_has_the_products_that_are_counted(planned, objective, remat):
    config, given, recipe, mesh = planned(objective=objective, remat=remat)
    assert given.size == Size(1008)
    arguments = rehearsal.arguments(config, recipe, given, mesh)
    traced = jax.make_jaxpr(training.update, static_argnums=0)(recipe, *arguments)
    counted = step_flops.update(recipe, given.size, Layers(0, 0, 3), 2)
    # Counted too many: gradients of inputs that nobody asks for.
    assert counted.total == pytest.approx(products(traced), rel=4e-3)
    assert counted.model == counted.total - counted.recomputed > counted.forward > 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_distillation_has_the_products_that_are_counted(planned, remat):
    planned()  # for the tiny model
    config = config_files.load("configs/digits_dmd2.py")
    config.model = "tiny"
    config.evaluate.height = config.evaluate.width = 192
    config.distill.update({"batch_size": 2, "remat": remat, "start_steps": 100})
    stage, mesh = stages.of(config), AbstractMesh((1,) * len(meshes.AXES), meshes.AXES)
    recipe = stage.recipe(mesh, 2)
    layers = Layers(0, 0, 3)  # `products` takes the costliest branch, the mixed one
    counted = step_flops.distillation(recipe, stage.given.size, layers)
    run = 2 * layers.forward(recipe.student, stage.given.size).total
    seen = []
    for program in stage.programs(recipe, mesh):
        (name,) = program.counted
        seen.append(name)
        traced = jax.make_jaxpr(program.update, static_argnums=0)(recipe, *program.arguments)
        # `products` counts the way to the step that is trained once, and not as often as usual.
        way = 0 if name == "start" else (program.loops - 1) * run
        assert counted[name].total - way == pytest.approx(products(traced), rel=4e-3)
    assert seen == ["generator", "fake score", "start"] and program.loops == 1.5


def test_one_layer_as_xla_counts_it():
    """cost_analysis counts a scan's body once, so one layer; and what is not a product, too."""
    config = WanConfig(num_layers=1, **SIZES)

    def forward(params, latents, time, text):
        return bind(wan.WanTransformer, config, params)(latents, time, text, None)

    arrays = ((1, 6, 24, 24, 16), (1,), (1, 40, 64))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]
    lowered = jax.jit(forward).lower(shapes(wan.WanTransformer, config), *inputs)
    theirs = lowered.compile().cost_analysis()["flops"]
    ours = flops.forward(config, 6 * 12 * 12, (), 40)
    assert ours < theirs < 1.1 * ours


def test_wan_step_and_collection():
    """design.md's forwards; a prototype collected 1,000 trajectories in 14 and 308 H100-hours."""
    small, large = WanConfig(), WanConfig(num_attention_heads=40, ffn_dim=13_824, num_layers=40)
    for config, size, hours, whole, rounded, target in (
        (small, Size(32_760), 14, 283, 178, 16),
        (large, Size(75_600), 308, 6_523, 3_954, 22),
    ):
        layers = config.num_layers
        forward = Layers(layers, 0, 0).forward(config, size).forward
        assert forward / 1e12 == pytest.approx(whole, rel=2e-3)
        linear = Layers(layers - target, target, 0).forward(config, size).forward
        assert linear / 1e12 == pytest.approx(rounded, rel=2e-3)
        work = step_flops.collect(config, size, 1000, 50).total
        assert 0.5 < work / (hours * 3600) / 989e12 < 0.65
        gradient = step_flops.gradient(config, size, Layers(layers, 0, 0), "full")
        assert gradient.model == 3 * forward
        assert 1.2 * forward < gradient.recomputed < 1.5 * forward


def test_muon_orthogonalises_every_matrix():
    config = WanConfig(num_layers=1, num_attention_heads=1, attention_head_dim=4, ffn_dim=8)
    # Five iterations of X X^T, its square, and their product with X.
    square, wide = 5 * 3 * 2 * 4**3, 5 * (2 * 2 * 4 * 4 * 8 + 2 * 4**3)
    assert step_flops.muon(config) == 8 * square + 2 * wide
