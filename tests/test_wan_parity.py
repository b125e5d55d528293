"""The transformer against diffusers' WanTransformer3DModel, float32, random weights."""

from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.keys import torch_entries
from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.wan import LINEAR, MIX, SOFTMAX, TEXT_TOKENS, WanConfig, WanTransformer
from linvideo_jax.parts import flat_shapes, unflatten

# Neither sizes nor counts coincide, and heads of 24 and 32 divide differently over three axes.
TINY = WanConfig(
    num_attention_heads=3,
    attention_head_dim=24,
    in_channels=5,
    out_channels=7,
    text_dim=20,
    freq_dim=18,
    ffn_dim=100,
    num_layers=3,
)
OTHER = replace(
    TINY, num_attention_heads=2, attention_head_dim=32, num_layers=2, patch_size=(2, 1, 3)
)


def diffusers_model(config: WanConfig) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**config.to_dict()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # All away from one and zero, so that no factor or bias can hide.
            center = float("norm" in name and name.endswith("weight"))
            spread = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.3
            weight.copy_(center + spread * torch.randn_like(weight))
    return model


def our_params(model: diffusers.WanTransformer3DModel, config: WanConfig) -> module.Params:
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    entries = torch_entries("transformer", flat_shapes("transformer", config))
    assert weights.keys() == entries.keys()
    flat = {entry.ours: entry.transform.to_ours(weights[key]) for key, entry in entries.items()}
    return unflatten("transformer", config, flat, None)


def example(config: WanConfig, grid: tuple[int, int, int], text_tokens: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = np.multiply(grid, config.patch_size)
    latents = rng.normal(size=(2, *shape, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, text_tokens, config.text_dim)).astype(np.float32)
    return latents, np.array([999.5, 31.25], np.float32), text


def run_diffusers(model, latents, timestep, text) -> np.ndarray:
    with torch.no_grad():
        video = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
        out = model(video, torch.from_numpy(timestep), torch.from_numpy(text)).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def relative_error(value, expected) -> float:
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def tiny():
    model = diffusers_model(TINY)
    return model, module.bind(WanTransformer, TINY, our_params(model, TINY))


@pytest.mark.parametrize("config, grid", [(TINY, (3, 2, 5)), (OTHER, (3, 4, 2))])
def test_equals_diffusers(config, grid):
    model = diffusers_model(config)
    ours = module.bind(WanTransformer, config, our_params(model, config))
    inputs = example(config, grid, text_tokens=11)
    expected = run_diffusers(model, *inputs)
    velocity = jax.jit(ours)(*inputs, None)
    assert velocity.dtype == jnp.float32
    assert relative_error(velocity, expected) < 1e-4


@pytest.mark.parametrize("lengths, tokens", [((3, 12), 13), ((0, 512), 512)])
def test_one_pad_key_stands_for_all_pads(tiny, lengths, tokens):
    model, ours = tiny
    latents, timestep, text = example(TINY, (3, 2, 5), TEXT_TOKENS)
    text *= np.arange(TEXT_TOKENS)[:, None] < np.array(lengths)[:, None, None]
    expected = run_diffusers(model, latents, timestep, text)
    velocity = ours(latents, timestep, text[:, :tokens], jnp.array(lengths))
    assert relative_error(velocity, expected) < 1e-4


@pytest.fixture(scope="module")
def hybrid():
    """A model with feature maps, each different, its inputs, and itself as a function."""
    config = replace(TINY, feature_map="hedgehog", num_layers=2)
    params = module.init(WanTransformer, config)
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(flat))
    flat = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, flat, strict=True)]
    inputs = (*example(config, (3, 2, 3), 7), jnp.array([5, 2]))

    def velocity(params, r, mode, **options):
        return module.bind(WanTransformer, config, params)(*inputs, r=r, mode=mode, **options)

    return jax.tree.unflatten(tree, flat), velocity


def test_mode_and_score_choose_the_attention_without_compiling_again(hybrid):
    params, velocity = hybrid
    apply = jax.jit(velocity)
    r = jnp.array([0.3, 0.8])

    def run(mode, r=r):
        return np.asarray(apply(params, r, jnp.array(mode)))

    softmax, linear = run([SOFTMAX] * 2), run([LINEAR] * 2)
    np.testing.assert_allclose(run([MIX] * 2, jnp.ones(2)), softmax, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run([MIX] * 2, jnp.zeros(2)), linear, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        run([MIX] * 2, jnp.array([1.0, 0.0])), run([SOFTMAX, LINEAR]), rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(run([SOFTMAX] * 2, 1 - r), softmax)
    mixed = run([MIX] * 2)
    outputs = [softmax, linear, mixed, run([LINEAR, SOFTMAX]), run([SOFTMAX, LINEAR])]
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-3 for other in outputs[:i])
    assert apply._cache_size() == 1
    np.testing.assert_allclose(velocity(params, None, None), softmax, rtol=0, atol=1e-5)


def test_gradients_reach_scores_and_feature_maps(hybrid):
    params, velocity = hybrid
    direction = np.random.default_rng(1).normal(size=velocity(params, None, None).shape)

    def loss(params, r, mode, remat):
        return jnp.vdot(velocity(params, r, mode, remat=remat), direction)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)
    r, mode = jnp.array([0.3, 0.8]), jnp.array([MIX, MIX])
    plain = gradient(params, r, mode, False)
    for leaf in jax.tree.leaves(plain):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    again = gradient(params, r, mode, True)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert relative_error(other, one) < 1e-4

    value = jax.jit(loss, static_argnums=3)
    step = jnp.array([0.0, 0.05])
    slope = (value(params, r + step, mode, False) - value(params, r - step, mode, False)) / 0.1
    np.testing.assert_allclose(plain[1][1], slope, rtol=2e-2)

    maps, scores = gradient(params, r, jnp.array([LINEAR, SOFTMAX]), True)
    assert not scores.any()
    for leaf in jax.tree.leaves(maps["blocks"]["attn1"]["feature_map"]):
        assert np.abs(leaf[0]).max() > 0 and not leaf[1].any()


def test_bfloat16_is_close_to_float32(hybrid):
    params, velocity = hybrid
    r, mode = jnp.array([0.3, 0.8]), jnp.array([LINEAR, MIX])
    rounded = velocity(params, r, mode, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, velocity(params, r, mode)) < 2e-2


def test_layers_start_different():
    kernel = module.init(WanTransformer, TINY)["blocks"]["attn1"]["to_q"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_config_keeps_diffusers_keys_and_refuses_other_models():
    ours = TINY.to_dict()
    theirs = diffusers.WanTransformer3DModel(**ours).config
    assert set(ours) == {key for key in theirs if not key.startswith("_")}
    assert WanConfig.from_dict({**ours, "_class_name": "WanTransformer3DModel"}) == TINY
    with pytest.raises(UserError, match="image_dim"):
        WanConfig.from_dict({**ours, "image_dim": 1280})
    with pytest.raises(UserError, match="depth"):
        WanConfig.from_dict({**ours, "depth": 3})


def test_wrong_shapes_and_modes_are_refused(tiny):
    _, ours = tiny
    latents, timestep, text = example(TINY, (3, 2, 5), 4)
    with pytest.raises(ValueError, match="patches"):
        ours(latents[:, :, :3], timestep, text, None)
    with pytest.raises(ValueError, match="feature_map"):
        ours(latents, timestep, text, None, mode=jnp.zeros(3, jnp.int32))
