"""What ports of Wan2.1 get wrong, one test each.

Elsewhere: pads that cross-attention sees (test_wan_parity, one key for all pads), whole time steps
and both grids (test_flow), sums in float32 (test_attention), VBench's names (test_requests).
"""

from dataclasses import replace

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flax import nnx
from test_wan_parity import TINY, diffusers_model, example, our_params, relative_error

from convert import original
from convert.keys import torch_entries
from kernels.dispatch import compiling_for
from kernels.linear_attention import FeatureMap, linear_attention
from linvideo_jax import video
from linvideo_jax.flow import grids, rectified, solvers
from linvideo_jax.models.layout import WHOLE
from linvideo_jax.models.module import bind
from linvideo_jax.models.rotary import rotary_axes, rotary_table
from linvideo_jax.models.wan import LINEAR, WanTransformer
from linvideo_jax.models.wan_layers import PatchEmbedding, SelfAttention
from linvideo_jax.parts import flat_shapes

CONFIG = replace(TINY, num_layers=1)
GRID = (3, 2, 5)


@pytest.fixture(scope="module")
def wan():
    """diffusers' one-layer model, our parameters, and ours compiled with them as arguments."""
    model = diffusers_model(CONFIG)
    run = jax.jit(
        lambda params, *inputs, dtype=jnp.float32: bind(WanTransformer, CONFIG, params)(
            *inputs, None, dtype=dtype
        ),
        static_argnames="dtype",
    )
    return model, our_params(model, CONFIG), run


def theirs(model, latents, timestep, text):
    with torch.no_grad():
        out = model(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timestep),
            torch.from_numpy(text),
        ).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def test_rms_norm_is_over_all_heads_together(wan):
    model, params, _ = wan
    x = np.random.default_rng(0).normal(size=(2, 7, CONFIG.dim)).astype(np.float32)
    x[..., : CONFIG.attention_head_dim] *= 10  # one loud head, which then quietens the others
    with torch.no_grad():
        expected = model.blocks[0].attn1.norm_q(torch.from_numpy(x)).numpy()
    attention = SelfAttention(CONFIG, nnx.Rngs(0))
    attention.norm_q.scale[...] = params["blocks"]["attn1"]["norm_q"]["scale"][0]
    ours = attention.normed(jnp.asarray(x), attention.norm_q)
    np.testing.assert_allclose(ours.reshape(x.shape), expected, rtol=1e-5, atol=1e-6)
    heads = x.reshape(2, 7, CONFIG.num_attention_heads, -1)
    per_head = heads / np.sqrt(np.mean(heads**2, axis=-1, keepdims=True))
    assert relative_error(per_head.reshape(x.shape), expected) > 0.3


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (32, (12, 10, 10))]
)
def test_rotary_dimensions_are_split_unevenly_over_time_height_width(head_dim, axes):
    assert rotary_axes(head_dim) == axes
    embed = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = embed(torch.zeros(1, 1, GRID[0], 2 * GRID[1], 2 * GRID[2]))
    for ours, expected in zip(rotary_table(GRID, head_dim), (cos, sin), strict=True):
        expected = expected.reshape(-1, 1, head_dim).numpy()
        np.testing.assert_allclose(np.repeat(ours, 2, axis=-1), expected, atol=1e-6)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_heads_are_normed_and_rotated_in_pairs(target):
    """Against complex numbers in float64; a GPU's program divides by the root at the end."""
    rng = np.random.default_rng(0)
    attention = SelfAttention(CONFIG, nnx.Rngs(0))
    attention.norm_q.scale[...] = scale = rng.normal(size=CONFIG.dim).astype(np.float32)
    rotation = rotary_table(GRID, CONFIG.attention_head_dim)
    x = rng.normal(size=(2, int(np.prod(GRID)), CONFIG.dim)).astype(np.float32)
    normed = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)) * scale
    pairs = normed.reshape(*x.shape[:2], CONFIG.num_attention_heads, -1, 2)
    turn = np.asarray(rotation[0]) + 1j * np.asarray(rotation[1])
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(*pairs.shape[:3], -1)
    with compiling_for(target):
        ours = attention.normed(jnp.asarray(x), attention.norm_q, rotation)
        rounded = attention.normed(jnp.asarray(x, jnp.bfloat16), attention.norm_q, rotation)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert rounded.dtype == jnp.bfloat16
    assert relative_error(np.asarray(rounded, np.float32), expected) < 0.01


def test_head_is_modulated_by_the_time_embedding_and_blocks_by_its_projection(wan):
    """With the projection switched off, time still reaches the head, and nothing else."""
    model, params, run = wan
    proj = model.condition_embedder.time_proj
    saved = {name: value.clone() for name, value in proj.state_dict().items()}
    embedder = params["condition_embedder"]
    silent = {name: 0 * value for name, value in embedder["time_proj"].items()}
    off = {**params, "condition_embedder": {**embedder, "time_proj": silent}}
    latents, timestep, text = example(CONFIG, GRID, 4)
    try:
        proj.load_state_dict({name: 0 * value for name, value in saved.items()})
        expected = theirs(model, latents, timestep, text)
    finally:
        proj.load_state_dict(saved)
    ours = run(off, latents, timestep, text)
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(run(off, latents, timestep[::-1].copy(), text), expected) > 1e-2


def test_norm3_of_the_original_is_norm2_of_diffusers():
    keys = [f"blocks.0.norm3.{x}" for x in ("weight", "bias")]
    renamed = original.rename(original.TRANSFORMER, keys, to_original=False)
    assert renamed == {key: key.replace("norm3", "norm2") for key in keys}
    back = original.rename(original.TRANSFORMER, renamed.values(), to_original=True)
    assert back == {value: key for key, value in renamed.items()}
    entries = torch_entries("transformer", flat_shapes("transformer", CONFIG))
    assert entries["blocks.0.norm2.weight"].ours == "blocks.0.norm2.scale"


def test_patches_go_in_channel_first_and_come_out_channel_last():
    """A convolution that orders each patch as the output does is undone by unpatchifying."""
    config = replace(CONFIG, in_channels=3, num_attention_heads=1, attention_head_dim=12)
    weight = np.zeros((12, 3, 1, 2, 2), np.float32)  # torch: [out, channel, time, height, width]
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                weight[(row * 2 + column) * 3 + channel, channel, 0, row, column] = 1
    transform = torch_entries("transformer", flat_shapes("transformer", config))[
        "patch_embedding.weight"
    ].transform
    embedding = PatchEmbedding(config, nnx.Rngs(0))
    embedding.kernel[...] = jnp.asarray(transform.to_ours(weight))
    latents = np.random.default_rng(0).normal(size=(1, 3, 4, 10, 3)).astype(np.float32)
    tokens = np.asarray(embedding(jnp.asarray(latents)))
    x = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
    conv = torch.nn.functional.conv3d(x, torch.from_numpy(weight), stride=(1, 2, 2))
    np.testing.assert_allclose(tokens, conv.flatten(2).transpose(1, 2).numpy(), atol=1e-6)
    pixels = tokens.reshape(1, 3, 2, 5, 2, 2, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    np.testing.assert_allclose(pixels.reshape(latents.shape), latents, atol=1e-6)


def test_time_embedding_and_modulation_stay_float32(wan):
    """bfloat16 cannot tell 999 from 998; a model that computes in it must."""
    _, params, run = wan
    latents, _, text = example(CONFIG, GRID, 4)
    times = [np.full(2, t, np.float32) for t in (999, 998)]
    assert jnp.bfloat16(999) == jnp.bfloat16(998)
    steps = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        one, other = (run(params, latents, time, text, dtype=dtype) for time in times)
        steps[dtype] = np.asarray(one - other)
    assert relative_error(steps[jnp.bfloat16], steps[jnp.float32]) < 0.3


@pytest.mark.parametrize("sampler", solvers.SAMPLERS)
@pytest.mark.parametrize("kind", grids.GRIDS)
def test_the_last_step_ends_at_sigma_zero_without_a_logarithm_of_it(sampler, kind):
    tables = {"unipc": solvers.unipc_table, "dpm++": solvers.dpm_table}
    for steps in (1, 2, 5, 50):
        sigmas = grids.sigma_grid(steps, 5.0, kind, sampler)
        assert sigmas[-1] == 0
        table = tables.get(sampler, solvers.euler_table)(sigmas)
        assert all(np.isfinite(part).all() for part in table)
        np.testing.assert_array_equal(table.predictor[-1], [0, 1, 0])


def test_guidance_of_one_is_none():
    """Wan's and diffusers' scale w; papers on distillation often write 1 + w."""
    cond, uncond, w = np.float32(3), np.float32(1), 5.0
    assert rectified.guided(cond, uncond, 1.0) == cond
    assert rectified.guided(cond, uncond, 1 + w) == cond + w * (cond - uncond)


def test_x0_near_pure_noise_is_taken_in_float32():
    """x - sigma u cancels; only u is rounded, however the network computes."""
    rng = np.random.default_rng(0)
    noise, data = rng.normal(size=(2, 64)).astype(np.float32)
    velocity = jnp.asarray(noise - data, jnp.bfloat16)
    sigmas = grids.sigma_grid(1, 5.0)
    final = solvers.sample(lambda x, t: velocity, noise, sigmas)
    expected = noise - np.float32(sigmas[0]) * np.asarray(velocity, np.float32)
    np.testing.assert_allclose(final, expected, atol=1e-6)
    rounded = jnp.asarray(noise, jnp.bfloat16) - velocity
    assert np.abs(np.asarray(rounded, np.float32) - expected).max() > 1e-3


def test_hedgehog_sees_rotated_queries_and_keys_through_maps_of_their_own():
    config = replace(CONFIG, feature_map="hedgehog")
    attention = SelfAttention(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, *attention.feature_map.q.shape)).astype(np.float32)
    attention.feature_map.q[...], attention.feature_map.k[...] = map(jnp.asarray, maps)
    x = jnp.asarray(rng.normal(size=(1, 30, config.dim)), jnp.float32)
    rotation = rotary_table(GRID, config.attention_head_dim)
    still = tuple(jnp.full_like(part, value) for part, value in zip(rotation, (1, 0), strict=True))
    v = attention.split_heads(attention.to_v(x))

    def expected(rotation, q_map, k_map):
        q, k, _ = attention.heads_of(x, rotation)
        out = linear_attention(q, k, v, FeatureMap(q=q_map, k=k_map))
        return attention.to_out(out.reshape(x.shape))

    ours = attention(x, rotation, jnp.float32(0), jnp.int32(LINEAR), WHOLE)
    np.testing.assert_allclose(ours, expected(rotation, *maps), rtol=1e-4, atol=1e-5)
    for other in (expected(still, *maps), expected(rotation, maps[0], maps[0])):
        assert relative_error(other, ours) > 1e-2


def test_videos_have_sixteen_frames_a_second(tmp_path):
    video.write_mp4(tmp_path / "clip.mp4", np.zeros((5, 16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
