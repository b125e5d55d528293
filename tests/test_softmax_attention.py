"""Softmax attention's implementations against the reference; its semantics: test_attention.py."""

import dataclasses
import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.ahead_of_time import compile_for_tpu
from kernels.dispatch import compiling_for
from kernels.gpu import GPU
from kernels.softmax_attention import (
    chunked,
    cudnn,
    hopper,
    interface,
    reference,
    softmax_attention,
    splash,
    tokamax_configs,
    tokamax_mosaic,
)


def arrays(dtype=jnp.float32, batch=2, tokens=7, keys=5, heads=3, head_dim=8):
    rng = np.random.default_rng(0)
    q, cotangent = rng.normal(size=(2, batch, tokens, heads, head_dim))
    k, v = rng.normal(size=(2, batch, keys, heads, head_dim))
    return [jnp.asarray(x, dtype) for x in (q, k, v, cotangent)]


def with_gradients(function, q, k, v, cotangent):
    def run(*args):
        out, pull = jax.vjp(function, *args)
        return out, *pull(cotangent)

    return jax.jit(run)(q, k, v)


def assert_same(ours, exact, atol=2e-5):
    for one, other in zip(ours, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("bias_shape", [None, (2, 1, 1, 5), (1, 3, 7, 5)])
def test_chunks_of_queries_give_the_same(bias_shape):
    given = arrays()
    bias = None
    if bias_shape:
        bias = jnp.asarray(np.random.default_rng(1).normal(size=bias_shape), jnp.float32)
    ours = with_gradients(lambda *x: chunked.softmax_attention(*x, bias, chunk=3), *given)
    assert_same(ours, with_gradients(lambda *x: reference.softmax_attention(*x, bias), *given))


def test_splash_with_padding_gives_the_same():
    given = arrays(batch=1, tokens=140, keys=130, heads=2, head_dim=128)
    ours = with_gradients(lambda *x: splash.softmax_attention(*x, None, interpret=True), *given)
    exact = with_gradients(lambda *x: reference.softmax_attention(*x, None), *given)
    assert_same(ours, exact, atol=1e-4)


def test_splash_serves_on_a_tpu_and_compiles():
    x = jax.ShapeDtypeStruct((1, 700, 2, 128), jnp.bfloat16)
    compiled = compile_for_tpu(softmax_attention, x, x, x, kind="v5p")
    assert "splash" in compiled.as_text()


def test_plain_jax_goes_by_the_size_of_the_logits(monkeypatch):
    q, k, v, _ = arrays()
    exact = softmax_attention(q, k, v, implementation="reference")
    served = []
    for name in ("chunked", "reference"):
        function = interface.IMPLEMENTATIONS[name]
        spy = lambda *args, name=name, function=function: served.append(name) or function(*args)  # noqa: E731
        spy.__name__ = "softmax_attention"
        monkeypatch.setitem(interface.IMPLEMENTATIONS, name, spy)
    softmax_attention(q, k, v)
    monkeypatch.setattr(interface, "LARGE", chunked.logits_bytes(q, k))
    np.testing.assert_allclose(softmax_attention(q, k, v), exact, atol=1e-6)
    monkeypatch.setenv(interface.VARIABLE, "tokamax,reference")
    softmax_attention(q, k, v)
    assert served == ["reference", "chunked", "reference"]


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    q, k, v, _ = arrays()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(2):
            softmax_attention(q, k, v, implementation=("cudnn", "reference"))
    wanted = "softmax_attention: reference serves (cudnn: needs an NVIDIA GPU, this is cpu)"
    assert [record.getMessage() for record in caplog.records] == [wanted]


def test_on_hopper_values_and_gradients_come_from_two_libraries(monkeypatch):
    """Both stand-ins are the reference, but for a factor that tells them apart."""
    given = arrays()
    exact = with_gradients(lambda *x: reference.softmax_attention(*x, None), *given)
    for module, factor in ((tokamax_mosaic, 2), (cudnn, 3)):
        monkeypatch.setattr(module, "check", lambda q, bias: None)
        stand_in = lambda *x, factor=factor: factor * reference.softmax_attention(*x)  # noqa: E731
        monkeypatch.setattr(module, "softmax_attention", stand_in)
    serve = lambda *x: hopper.softmax_attention(*x, None)  # noqa: E731
    assert_same([serve(*given[:3])], [2 * exact[0]])
    assert_same(with_gradients(serve, *given), [3 * x for x in exact], atol=1e-4)


@pytest.mark.parametrize(("tokens", "keys"), [(7, 5), (8, 5), (7, 6), (8, 6)])
def test_cudnn_sees_even_lengths_alone(monkeypatch, tokens, keys):
    library = jax.nn.dot_product_attention

    def attention(q, k, v, implementation, **lengths):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return library(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(cudnn, "check", lambda q, bias: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    given = arrays(tokens=tokens, keys=keys)
    ours = with_gradients(lambda *x: cudnn.softmax_attention(*x, None), *given)
    assert_same(ours, with_gradients(lambda *x: reference.softmax_attention(*x, None), *given))


@pytest.mark.parametrize(
    ("name", "options", "platform", "reason"),
    [
        ("hopper", {}, "gpu", "needs bfloat16 or float16, got float32"),
        ("tokamax", {}, "cpu", "needs an NVIDIA GPU, this is cpu"),
        ("tokamax", {}, "gpu", "needs bfloat16 or float16, got float32"),
        ("tokamax", {"dtype": jnp.float16}, "gpu", "needs head_dim 64 or 128, got 8"),
        ("splash", {}, "gpu", "needs a TPU, this is gpu"),
        ("splash", {"dtype": jnp.float16}, "tpu", "needs bfloat16 or float32, got float16"),
        ("splash", {}, "tpu", "needs a head_dim that is a multiple of 128"),
    ],
)
def test_what_libraries_do_not_take_is_said(name, options, platform, reason):
    q, k, v, _ = arrays(**options)
    with compiling_for(platform), pytest.raises(NotImplementedError, match=f"{name}: {reason}"):
        softmax_attention(q, k, v, implementation=name)


def test_tokamax_is_imported_before_anything_is_traced(monkeypatch):
    """A stand-in for the package that says when it is imported."""
    seen = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "tokamax":
                seen.append(name)

    monkeypatch.delitem(sys.modules, "tokamax", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    for plugin, platforms, wanted in ((None, "", 0), ("a plugin", "cpu", 0), ("a plugin", "", 1)):
        monkeypatch.setattr(tokamax_mosaic.importlib.util, "find_spec", lambda name, p=plugin: p)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        tokamax_mosaic.import_early()
        assert len(seen) == wanted


def test_a_missing_package_is_a_refusal(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q, k, v, _ = arrays(jnp.bfloat16, head_dim=64)
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match="package tokamax"):
        softmax_attention(q, k, v, implementation="tokamax")
    monkeypatch.setattr(tokamax_mosaic, "target", lambda: GPU("NVIDIA A100", 8.0, 108))
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        softmax_attention(q, k, v, implementation="tokamax")


STORED = [
    {
        "device": "H",
        "capability": 9.0,
        "dtype": "bfloat16",
        "head_dim": 128,
        "heads": 12,
        "tokens": 32760,
        **rest,
    }
    for rest in (
        {"device": "H2", "keys": 32760, "config": {"block_kv": 256, "num_stages": 2}},
        {"keys": 32760, "config": {"block_kv": 192, "num_stages": 2}},
        {"keys": 512, "config": {"block_kv": 128, "num_stages": 3}},
        {"keys": 512, "heads": 40, "config": {"block_kv": 64, "num_stages": 4}},
    )
]


@pytest.mark.parametrize(
    ("changed", "block_kv"),
    [
        ({}, 192),
        ({"heads": 40, "tokens": 75600, "keys": 75600}, 192),
        ({"keys": 512}, 128),
        ({"keys": 512, "heads": 24}, 64),  # nearer to 40 heads than to 12
        ({"keys": 300}, 128),
        ({"keys": 160}, None),  # two blocks of 128 keys for three stages
        ({"keys": 4096}, None),  # far from both
        ({"dtype": "float16"}, None),
        ({"head_dim": 64}, None),
        ({"device": "H2"}, 256),  # this chip's before its relatives' of the same size
        ({"device": "H2", "keys": 512}, 128),
        ({"device": "a third of the family", "keys": 512}, 128),
        ({"device": "another chip", "capability": 8.0}, None),
    ],
)
def test_the_nearest_configuration_of_tokamax_is_chosen(monkeypatch, tmp_path, changed, block_kv):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(STORED))
    monkeypatch.setattr(tokamax_configs, "STORED", stored)
    sizes = {"dtype": "bfloat16", "head_dim": 128, "heads": 12, "tokens": 32760, "keys": 32760}
    gpu = GPU(changed.get("device", "H"), changed.get("capability", 9.0), 132)
    layer = tokamax_configs.Layer(**{name: changed.get(name, sizes[name]) for name in sizes})
    tokamax_configs.stored.cache_clear()
    try:
        config = tokamax_configs.choose(gpu, layer)
    finally:
        tokamax_configs.stored.cache_clear()
    assert (config and config["block_kv"]) == block_kv


def test_another_version_of_tokamax_decides_itself(monkeypatch):
    """One without the kernel's name, or whose configuration lacks a field."""
    q = jnp.zeros((2, 8, 3, 64), jnp.bfloat16)
    assert tokamax_configs.Layer.of(q, q[:, :4]) == ("bfloat16", 64, 6, 8, 4)
    api = "tokamax._src.ops.attention.api"
    for name in ("tokamax", "tokamax._src", "tokamax._src.ops", "tokamax._src.ops.attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, api, None)
    assert tokamax_mosaic.configured(q, q, q, {"block_kv": 64}) is None
    module = types.ModuleType(api)
    module.IMPLEMENTATIONS = {"mosaic_gpu": TheirKernel()}
    monkeypatch.setitem(sys.modules, api, module)
    assert tokamax_mosaic.configured(q, q, q, {"block_kv": 64}).config == TheirConfig(64)
    assert tokamax_mosaic.configured(q, q, q, {"block_keys": 64}) is None


@dataclasses.dataclass
class TheirConfig:
    block_kv: int


class TheirKernel:
    """What is used of tokamax's."""

    def bind(self, q, k, v):
        return types.SimpleNamespace(heuristics_config=TheirConfig(128))

    def replace(self, config):
        return types.SimpleNamespace(config=config)
