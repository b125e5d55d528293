"""Which parameters Muon takes, the size of its steps, and the schedule."""

import jax
import jax.numpy as jnp
import numpy as np

from linvideo_jax import optimizers
from linvideo_jax.models import module
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.wan import WanConfig, WanTransformer

WAN = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
    text_dim=8, freq_dim=8, ffn_dim=40, feature_map="hedgehog",
)  # fmt: skip
UMT5 = UMT5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)


def names_of_matrices(params):
    axes = optimizers._matrix_axes(params)
    named = jax.tree_util.tree_flatten_with_path(
        axes, is_leaf=lambda leaf: isinstance(leaf, optimizers.MuonDimensionNumbers)
    )[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named}


def test_muon_takes_the_matrices_of_the_blocks():
    attention = {f"{a}.to_{x}" for a in ("attn1", "attn2") for x in ("q", "k", "v", "out")}
    wan = {f"blocks.{name}.kernel" for name in attention | {"ffn.linear_1", "ffn.linear_2"}}
    assert names_of_matrices(module.shapes(WanTransformer, WAN)) == wan
    umt5 = {"attention.q", "attention.k", "attention.v", "attention.o"}
    umt5 |= {"ffn.wi_0", "ffn.wi_1", "ffn.wo"}
    umt5 = {f"blocks.{name}.kernel" for name in umt5}
    assert names_of_matrices(module.shapes(UMT5Encoder, UMT5)) == umt5


def test_steps_of_matrices_are_orthogonal_of_adams_size_one_layer_at_a_time():
    rng = np.random.default_rng(0)
    grads = {"blocks": {"to_q": {"kernel": jnp.asarray(rng.normal(size=(2, 24, 12)))}}}
    grads["proj_out"] = {"kernel": jnp.asarray(rng.normal(size=(12, 4)))}
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = optimizers.muon_with_adam()
    changes, _ = optimizer.update(grads, optimizer.init(params), params)
    for layer in np.asarray(changes["blocks"]["to_q"]["kernel"]):
        singular = np.linalg.svd(layer)[1]
        assert singular.max() < 1.9 * singular.min()  # Newton-Schulz ends within this
        np.testing.assert_allclose(np.sqrt(np.mean(layer**2)), 0.2, rtol=0.25)
    adam = np.asarray(changes["proj_out"]["kernel"])
    signs = -np.sign(grads["proj_out"]["kernel"])
    np.testing.assert_allclose(adam * signs, adam.flat[0] * signs.flat[0], rtol=1e-5)
    # One layer's step does not depend on the other's gradient.
    other = {"blocks": {"to_q": {"kernel": grads["blocks"]["to_q"]["kernel"].at[1].mul(-3.0)}}}
    again, _ = optimizer.update(grads | other, optimizer.init(params), params)
    ours, theirs = (x["blocks"]["to_q"]["kernel"][0] for x in (changes, again))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_apply_multiplies_by_the_rate():
    params, changes = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([-1.0, 4.0])}
    np.testing.assert_allclose(optimizers.apply(params, changes, 0.5)["a"], [0.5, 4.0])


def test_schedule_warms_up_and_falls_to_its_end():
    schedule = optimizers.warmup_cosine(2.0, 100, 10, 0.1)
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 5, 10, 55, 100, 200)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-5
    )
    assert np.isfinite(optimizers.warmup_cosine(1.0, 5, 10)(7))  # shorter than its warm-up
