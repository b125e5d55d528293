"""The mesh, its table and its exchange, without devices: what is chosen and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

import sample
from linvideo_jax.errors import UserError
from linvideo_jax.models import wan
from linvideo_jax.models.module import shapes
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import pictures, rules
from linvideo_jax.parallel.layout import choose_exchange, layout_of
from linvideo_jax.parallel.placement import Placement


def mesh_of(**sizes):
    sizes = {name: sizes.get(name, 1) for name in meshes.AXES}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("asked", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1)),
        ({"context": 4}, 8, (2, 1, 4)),
        ({"data": 2, "fsdp": -1, "context": 2}, 16, (2, 4, 2)),
        ({"data": 1, "fsdp": 1, "context": 0}, 3, (1, 1, 3)),
        ({"data": 2, "fsdp": 2, "context": 2}, 8, (2, 2, 2)),
    ],
)
def test_sizes_multiply_to_the_devices(asked, devices, sizes):
    assert tuple(meshes.resolve(asked, devices).values()) == sizes


@pytest.mark.parametrize(
    ("asked", "devices", "message"),
    [
        ({"context": 3}, 8, "context:3 does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2, "context": 2}, 16, "does not multiply to the 16 devices"),
        ({"data": 2}, 1, "does not multiply to the 1 device:"),
        ({"data": -1, "fsdp": -1}, 8, "leaves both data and fsdp open"),
        ({"data": -2}, 8, "has data:-2: choose 1 or more"),
        ({"tensor": 2}, 8, "has no axis 'tensor'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, devices, message):
    with pytest.raises(UserError, match=message):
        meshes.resolve(asked, devices)


def test_a_flag_is_read_or_refused():
    assert meshes.parse("data:2, context:4") == {"data": 2, "context": 4}
    for text, message in (
        ("context=4", "cannot be read"),
        ("context:4,context:2", "names context twice"),
        ("contxt:4", "has no axis 'contxt'"),
    ):
        with pytest.raises(UserError, match=message):
            meshes.parse(text)


def test_sample_refuses_a_mesh_that_this_machine_has_not(tmp_path, capsys):
    words = ["--checkpoint=assets/wan_digits", "--prompt=a red 3", f"--out={tmp_path / 'out'}"]
    for mesh, message in (("context:64", "does not divide the 1 device"), ("all", "cannot be")):
        assert sample.main(["sample.py", *words, f"--mesh={mesh}"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ulysses_needs_heads_that_divide_and_auto_takes_the_ring_instead():
    assert choose_exchange("auto", mesh_of(context=4), 12) == "ulysses"
    assert choose_exchange("auto", mesh_of(context=8), 12) == "ring"
    assert choose_exchange("ring", mesh_of(context=4), 12) == "ring"
    with pytest.raises(UserError, match="shares 12 heads between context:8 devices"):
        choose_exchange("ulysses", mesh_of(context=8), 12)
    with pytest.raises(UserError, match=r"mesh\.exchange is 'rings'"):
        choose_exchange("rings", mesh_of(context=8), 12)


def test_one_device_is_the_plain_path():
    assert layout_of(mesh_of(), 12) is None
    placement = Placement.of(ConfigDict(), 12)
    batch = {"x": np.arange(6)}
    assert placement.layout is None and placement.batch(batch, 6) is batch
    np.testing.assert_array_equal(placement.make(np.arange, 3), np.arange(3))


def test_a_program_that_uses_the_hosts_memory_is_compiled_once():
    placement = Placement.of(ConfigDict(), 12, jax.devices()[:1])

    @jax.jit
    def update(x):
        away = jax.device_put(2 * x, jax.memory.Space.Host)
        return jax.device_put(away, jax.memory.Space.Device)

    for begin in (placement.make(jnp.ones, 3), placement.params(np.ones(3, np.float32))):
        np.testing.assert_array_equal(update(update(begin)), 4 * np.ones(3))
    assert update._cache_size() == 1


def test_a_batch_is_shared_by_the_axes_that_divide_it():
    mesh = mesh_of(data=2, fsdp=4)
    assert meshes.batch_spec(mesh, 8) == ("data", "fsdp")
    assert meshes.batch_spec(mesh, 6) == ("data",)
    assert meshes.batch_spec(mesh, 3) is None


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (wan.WanTransformer, wan.WanConfig(num_layers=2, feature_map="hedgehog")),
        (UMT5Encoder, UMT5Config(num_layers=2)),
    ],
)
def test_the_table_shares_nearly_all_of_a_network_evenly(module, config):
    mesh = mesh_of(data=2, fsdp=8)
    flat = jax.tree_util.tree_leaves_with_path(shapes(module, config))
    whole = here = 0
    for path, leaf in flat:
        name = rules.name_of(path)
        spec = rules.spec(name, leaf.shape, mesh)
        if name.startswith("blocks"):  # the axis of the layers is never shared
            assert not spec or spec[0] is None
        parts = 8 if "fsdp" in jax.tree.leaves(tuple(spec)) else 1
        whole += leaf.size
        here += leaf.size / parts
    assert here < 1.02 * whole / 8


def test_moments_lie_as_their_parameters_whatever_the_tree_around_them():
    mesh, shape = mesh_of(fsdp=4), (3, 64, 128)
    for prefix in ("", "params/", "ema/", "optimizer/1/inner_states/x/0/mu/", "score/params/"):
        assert rules.spec(f"{prefix}blocks/attn1/to_q/kernel", shape, mesh)[1] == "fsdp"
    assert rules.layer_spec("attn1/to_q/kernel", shape[1:], mesh)[0] == "fsdp"
    # An axis that does not divide gives way to the next, and a factored moment stays whole.
    assert rules.spec("blocks/ffn/linear_1/kernel", (3, 66, 128), mesh)[2] == "fsdp"
    assert rules.spec("blocks/ffn/linear_1/kernel", (3, 66, 126), mesh) == PartitionSpec()
    assert rules.spec("v_row/blocks/ffn/linear_1/kernel", (3, 64), mesh) == PartitionSpec()


def test_the_vae_is_whole_on_every_device():
    flat = jax.tree_util.tree_leaves_with_path(shapes(WanVAE, VAEConfig(base_dim=8)))
    mesh = mesh_of(fsdp=8)
    assert all(rules.spec(rules.name_of(p), x.shape, mesh) == PartitionSpec() for p, x in flat)


@pytest.mark.parametrize(
    ("devices", "videos", "size", "parts"),
    [
        (8, 1, (90, 160), (1, 2, 4, 1)),  # 720p; 8 do not divide its rows
        (8, 2, (60, 104), (2, 2, 2, 1)),
        (8, 8, (60, 104), (8, 1, 1, 1)),
        (16, 1, (60, 104), (1, 4, 4, 1)),
        (7, 1, (60, 104), (1, 1, 1, 7)),
    ],
)
def test_pictures_are_cut_into_equal_parts(devices, videos, size, parts):
    assert pictures.parts(devices, videos, *size) == parts
