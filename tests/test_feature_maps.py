"""The ablation's feature maps against their kernels, quadratic in the tokens, in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import to_torch
from kernels.linear_attention import (
    FeatureMap,
    apply_state,
    combine_states,
    linear_attention,
    linear_attention_state,
)
from kernels.linear_attention.feature_maps import FEATURES as BY_NAME
from linvideo_jax import checkpoints, evaluation
from linvideo_jax.metrics import flops
from linvideo_jax.models.layout import WHOLE
from linvideo_jax.models.rotary import rotary_table
from linvideo_jax.models.wan import LINEAR, MIX, WanConfig, initial_feature_map
from linvideo_jax.models.wan_config import FEATURE_MAPS
from linvideo_jax.models.wan_layers import SelfAttention
from linvideo_jax.pipeline import Pipeline, Settings

FEATURES = 4


def relu_kernel(y_q, y_k):
    return sum(np.maximum(s * y_q, 0) @ np.maximum(s * y_k, 0).T for s in (1, -1))


def taylor_kernel(y_q, y_k):
    s = y_q @ y_k.T
    return 1 + s + s**2 / 2


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 7, 3, 6))
    return q, k, v, rng.normal(size=(2, 3, 6, FEATURES))


@pytest.mark.parametrize(
    ("name", "kernel", "size"),
    [("relu", relu_kernel, 2 * FEATURES), ("taylor", taylor_kernel, 1 + FEATURES + FEATURES**2)],
)
def test_products_of_features_are_the_kernel(arrays, name, kernel, size):
    q, k, v, maps = arrays
    to_q, to_k, to_v, to_maps = (jnp.asarray(array, jnp.float32) for array in arrays)
    feature_map = FeatureMap(*to_maps, name)
    assert BY_NAME[name].of(to_q, to_maps[0]).shape == (2, 7, 3, size)
    assert BY_NAME[name].count(FEATURES) == size
    out = linear_attention(to_q, to_k, to_v, feature_map)
    for b, h in np.ndindex(2, 3):
        weights = kernel(q[b, :, h] @ maps[0, h], k[b, :, h] @ maps[1, h])
        expected = weights @ v[b, :, h] / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(out[b, :, h], expected, rtol=1e-4, atol=1e-4)


def test_states_of_another_map_combine(arrays):
    q, k, v, maps = (jnp.asarray(array, jnp.float32) for array in arrays)
    feature_map = FeatureMap(*maps, "taylor")
    parts = [linear_attention_state(k[:, i], v[:, i], feature_map) for i in np.s_[:3, 3:]]
    ours = apply_state(q, combine_states(*parts), feature_map)
    np.testing.assert_allclose(ours, linear_attention(q, k, v, feature_map), rtol=1e-4, atol=1e-5)


def test_unknown_map_and_kernels_that_take_hedgehogs_alone(arrays):
    q, k, v, maps = (jnp.asarray(array, jnp.float32) for array in arrays)
    with pytest.raises(ValueError, match="no feature map 'elu'"):
        linear_attention(q, k, v, FeatureMap(*maps, "elu"))
    for kernel in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="takes Hedgehog's map, got relu"):
            linear_attention(q, k, v, FeatureMap(*maps, "relu"), implementation=kernel)


CONFIG = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=24, text_dim=8, freq_dim=8
)


@pytest.mark.parametrize(("name", "kernel"), [("relu", relu_kernel), ("taylor", taylor_kernel)])
def test_the_model_has_them_after_the_rotation(name, kernel):
    assert tuple(BY_NAME) == FEATURE_MAPS
    attention = SelfAttention(replace(CONFIG, feature_map=name), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    maps = rng.normal(scale=0.5, size=(2, *attention.feature_map.q.shape)).astype(np.float32)
    attention.feature_map.q[...], attention.feature_map.k[...] = map(jnp.asarray, maps)
    x = jnp.asarray(rng.normal(size=(1, 12, CONFIG.dim)), jnp.float32)
    rotation = rotary_table((3, 2, 2), CONFIG.attention_head_dim)
    q, k, v = (np.asarray(heads, np.float64) for heads in attention.heads_of(x, rotation))
    linear = np.zeros_like(v)
    for h in range(2):
        weights = kernel(q[0, :, h] @ maps[0, h], k[0, :, h] @ maps[1, h])
        linear[0, :, h] = weights @ v[0, :, h] / weights.sum(1, keepdims=True)

    def out(heads):
        return attention.to_out(jnp.asarray(heads, jnp.float32).reshape(x.shape))

    ours = attention(x, rotation, jnp.float32(0), jnp.int32(LINEAR), WHOLE)
    np.testing.assert_allclose(ours, out(linear), rtol=1e-3, atol=1e-4)
    softmax = attention(x, rotation, jnp.float32(1), jnp.int32(MIX), WHOLE)
    half = attention(x, rotation, jnp.float32(0.5), jnp.int32(MIX), WHOLE)
    np.testing.assert_allclose(half, (ours + softmax) / 2, rtol=1e-3, atol=1e-4)


def test_taylor_begins_with_softmaxs_logits():
    """On the coordinates that the initial W selects."""
    config = replace(CONFIG, feature_map="taylor")
    weight = initial_feature_map(config)["q"][0, 0]
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 12)) * (weight != 0).any(1)
    products = taylor_kernel(q @ weight, k @ weight)
    logits = q @ k.T / 12**0.5
    np.testing.assert_allclose(products, 1 + logits + logits**2 / 2, rtol=1e-6)


def test_operations():
    def count(name, head_dim=128):
        config = replace(WanConfig(), feature_map=name, attention_head_dim=head_dim)
        return flops.linear_attention(config, 1000)

    assert count("hedgehog") == count("relu") == count(None)
    # 4,161 features a head, and two projections of 64: 4 (64 + 4161) against 4 (64 + 128).
    assert count("taylor") / count("hedgehog") == pytest.approx(4225 / 192)


def test_a_student_with_another_map_is_kept_and_sampled_and_not_exported(
    tiny_pipeline, tmp_path, capsys
):
    teacher = checkpoints.load(tiny_pipeline.folder)
    videos = []
    for name in ("hedgehog", "relu"):
        student = evaluation.untrained(teacher, (1,), name)
        folder = tmp_path / name
        parts = {part: getattr(student, part) for part in ("transformer", "vae", "text_encoder")}
        checkpoints.save(folder, config=student.config, tokenizer=teacher.tokenizer_folder, **parts)
        read = checkpoints.load(folder)
        assert read.wan_config.feature_map == read.config["feature_map"] == name
        settings = Settings.of(read, num_inference_steps=1)
        videos.append(Pipeline(read).latents(["a red 3 moves right"], [0], settings, 1))
    assert np.abs(videos[0] - videos[1]).max() > 1e-4
    words = [f"--checkpoint={tmp_path / 'relu'}", f"--out={tmp_path / 'out'}"]
    assert to_torch.main(["to_torch.py", *words, "--layout=diffusers"]) == 2
    assert "feature map 'relu', which exists for ablations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
