"""The transformer against diffusers' WanTransformer3DModel, float32, random weights."""

from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.keys import torch_entries
from kernels.dispatch import compiling_for
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


@pytest.mark.parametrize(
    "config, grid, target",
    [(TINY, (3, 2, 5), "cpu"), (OTHER, (3, 4, 2), "cpu"), (TINY, (3, 2, 5), "gpu")],
)
def test_equals_diffusers(config, grid, target):
    """As a CPU computes it, and by the forms that a GPU is given."""
    model = diffusers_model(config)
    ours = module.bind(WanTransformer, config, our_params(model, config))
    inputs = example(config, grid, text_tokens=11)
    expected = run_diffusers(model, *inputs)
    with compiling_for(target):
        velocity = jax.jit(ours)(*inputs, None)
    assert velocity.dtype == jnp.float32
    assert relative_error(velocity, expected) < 1e-4


@pytest.mark.parametrize("lengths, tokens", [((3, 12), 13), ((0, 512), 512)])
def test_one_pad_key_stands_for_all_pads(tiny, lengths, tokens):
    model, ours = tiny
    latents, timestep, text = example(TINY, (3, 2, 5), TEXT_TOKENS)
    text *= np.arange(TEXT_TOKENS)[:, None] < np.array(lengths)[:, None, None]
    expected = run_diffusers(model, latents, timestep, text)
    velocity = jax.jit(ours)(latents, timestep, text[:, :tokens], jnp.array(lengths))
    assert relative_error(velocity, expected) < 1e-4


def test_text_and_time_may_be_embedded_before_the_loop(tiny):
    """One text, two times; and on an accelerator all pads are keys, which is the same."""
    _, ours = tiny
    latents, timestep, text = example(TINY, (3, 2, 5), 13)
    lengths = jnp.array([3, 12])
    text *= np.arange(13)[:, None] < np.array(lengths)[:, None, None]
    expected = [jax.jit(ours)(latents, np.full(2, t), text, lengths) for t in timestep]
    times = ours.embed_time(jnp.asarray(timestep)[:, None])
    few = ours.embed_text(text, lengths, video_tokens=4096)
    with compiling_for("gpu"):
        still_few = ours.embed_text(text, lengths, video_tokens=4095)
        all_pads = ours.embed_text(text, lengths, video_tokens=4096)
    assert few.keys.k.shape == still_few.keys.k.shape == (3, 2, 13, 3, 24)
    assert all_pads.keys.k.shape == (3, 2, TEXT_TOKENS, 3, 24) and all_pads.bias is None
    run = jax.jit(lambda time, text: ours(latents, time, text, None))
    for i, wanted in enumerate(expected):
        time = jax.tree.map(lambda x, i=i: x[i], times)
        assert relative_error(run(time, few), wanted) < 1e-5
        assert relative_error(run(time, all_pads), wanted) < 1e-5


@pytest.fixture(scope="module")
def hybrid():
    """A random model with feature maps: its parameters, and its velocity, plain and compiled."""
    config = replace(TINY, feature_map="hedgehog", num_layers=2)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32),
        module.shapes(WanTransformer, config),
    )
    # Sharp enough for the two attentions to differ.
    params["blocks"]["attn1"]["norm_q"]["scale"] *= 8
    inputs = (*example(config, (3, 2, 3), 7), jnp.array([5, 2]))

    def velocity(params, r, mode, **options):
        return module.bind(WanTransformer, config, params)(*inputs, r=r, mode=mode, **options)

    return params, velocity, jax.jit(velocity)


def test_mode_and_score_choose_the_attention_without_compiling_again(hybrid):
    params, velocity, compiled = hybrid
    r = jnp.array([0.3, 0.8])

    def run(mode, r=r):
        return np.asarray(compiled(params, r, jnp.array(mode)))

    softmax, linear = run([SOFTMAX] * 2), run([LINEAR] * 2)
    assert relative_error(run([MIX] * 2, jnp.ones(2)), softmax) < 1e-5
    assert relative_error(run([MIX] * 2, jnp.zeros(2)), linear) < 1e-5
    assert relative_error(run([MIX] * 2, jnp.array([1.0, 0.0])), run([SOFTMAX, LINEAR])) < 1e-5
    np.testing.assert_array_equal(run([SOFTMAX] * 2, 1 - r), softmax)
    outputs = [softmax, linear, run([MIX] * 2), run([LINEAR, SOFTMAX]), run([SOFTMAX, LINEAR])]
    for i, one in enumerate(outputs):
        assert all(relative_error(one, other) > 1e-3 for other in outputs[:i])
    assert compiled._cache_size() == 1
    assert relative_error(velocity(params, None, None), softmax) < 1e-5


def test_gradients_reach_scores_and_feature_maps(hybrid):
    params, velocity, compiled = hybrid
    r, mode = jnp.array([0.3, 0.8]), jnp.array([MIX, MIX])
    rng = np.random.default_rng(1)
    direction = rng.normal(size=compiled(params, r, mode).shape)

    def loss(params, r, mode):
        return jnp.vdot(velocity(params, r, mode, remat="products"), direction)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    weights, scores = gradient(params, r, mode)
    assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves((weights, scores)))

    size = 1e-3
    step = jax.tree.map(lambda x: size * rng.normal(size=x.shape).astype(np.float32), (params, r))
    up, down = (
        compiled(*jax.tree.map(lambda x, dx, sign=sign: x + sign * dx, (params, r), step), mode)
        for sign in (1, -1)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, (weights, scores), step)))
    np.testing.assert_allclose(slope, np.vdot(up - down, direction) / 2, rtol=1e-2)

    step = jnp.array([0.0, 0.05])
    change = compiled(params, r + step, mode) - compiled(params, r - step, mode)
    np.testing.assert_allclose(scores[1], np.vdot(change, direction) / 0.1, rtol=1e-2)

    weights, scores = gradient(params, r, jnp.array([LINEAR, SOFTMAX]))
    assert not scores.any()
    for leaf in jax.tree.leaves(weights["blocks"]["attn1"]["feature_map"]):
        assert leaf[0].any() and not leaf[1].any()


def test_bfloat16_is_close_to_float32(hybrid):
    params, velocity, compiled = hybrid
    r, mode = jnp.array([0.3, 0.8]), jnp.array([LINEAR, MIX])
    rounded = velocity(params, r, mode, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, compiled(params, r, mode)) < 3e-2


def test_layers_start_different():
    kernel = jax.jit(lambda: module.init(WanTransformer, TINY))()["blocks"]["attn1"]["to_q"][
        "kernel"
    ]
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
    with pytest.raises(ValueError, match="feature map"):
        ours(latents, timestep, text, None, mode=jnp.zeros(3, jnp.int32))
