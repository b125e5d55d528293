"""The whole way from prompts to pixels against diffusers' WanPipeline, in float32."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from linvideo_jax import checkpoints, pipeline
from linvideo_jax.models import wan
from linvideo_jax.models.wan import LINEAR, SOFTMAX, initial_feature_map
from linvideo_jax.pipeline import Pipeline, Settings

PROMPTS = [
    "a red 3 moves right",
    "the yellow nine goes slowly down, and a blue 7 moves up on a green background",
]


@pytest.fixture(scope="module")
def ours(tiny_pipeline):
    return Pipeline(checkpoints.load(tiny_pipeline.folder))


def diffusers_run(theirs, settings, noise, output_type):
    with torch.no_grad():
        frames = theirs(
            PROMPTS,
            negative_prompt=settings.negative_prompt,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
            output_type=output_type,
        ).frames
    return frames.numpy().transpose(0, 2, 3, 4, 1) if output_type == "latent" else frames


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "black bounces"},
        {"num_inference_steps": 2, "guidance_scale": 1.0},
    ],
    ids=["guided", "unguided"],
)
def test_same_noise_same_latents_and_video(tiny_pipeline, ours, overrides):
    settings = Settings.of(ours.checkpoint, height=48, width=32, num_frames=9, **overrides)
    shape = ours.latent_shape(settings)
    assert shape == (3, 6, 4, 4)
    noise = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    theirs = diffusers_run(tiny_pipeline.theirs, settings, noise, "latent")
    latents = ours.latents(PROMPTS, [0, 1], settings, 2, start=jnp.asarray(noise))
    assert np.abs(latents - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(theirs - noise).max() > 0.1, "the network must have done something"

    theirs = np.round(diffusers_run(tiny_pipeline.theirs, settings, noise, "np") * 255)
    video = ours.decode(latents)
    assert video.shape == theirs.shape == (2, 9, 48, 32, 3)
    assert video.dtype == np.uint8 and theirs.std() > 1
    difference = np.abs(video.astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_all_pads_as_keys_are_one_program_for_every_length(ours, monkeypatch):
    """What accelerators do at full size: the same latents, and prompts of any length together."""
    settings = Settings.of(ours.checkpoint, num_inference_steps=2)
    prompts = [PROMPTS[0], "red " * 40]
    wanted = ours.latents(prompts, [0, 1], settings, 2)
    assert len(list(ours.batches(prompts, [0, 1], settings, 2))) == 2
    for module in (pipeline, wan):
        monkeypatch.setattr(module, "pads_are_keys", lambda video_tokens: True)
    ((rows, latents),) = ours.batches(prompts, [0, 1], settings, 2)
    assert rows == [0, 1]
    assert np.abs(np.asarray(latents) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_defaults_come_from_the_folder(ours):
    settings = Settings.of(ours.checkpoint, guidance_scale=None, height=64)
    assert settings == Settings(64, 48, 5, 3, 2.0, 3.0, "unipc", "")


def test_our_own_folder_gives_the_same(tiny_pipeline, ours, tmp_path):
    """Saved as Orbax and loaded again: the same latents, bit for bit, from the same defaults."""
    checkpoint = ours.checkpoint
    checkpoints.save(
        tmp_path / "own",
        config=checkpoint.config,
        transformer=checkpoint.transformer,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer_folder,
    )
    own = Pipeline(checkpoints.load(tmp_path / "own"))
    runs = [
        p.latents(PROMPTS, [0, 1], Settings.of(p.checkpoint, negative_prompt=""), 2)
        for p in (ours, own)
    ]
    np.testing.assert_array_equal(*runs)


def test_linear_layers_of_a_checkpoint_are_linear(ours):
    """A student: the layers that its config.json names run linear, and no others."""
    checkpoint = ours.checkpoint
    wan_config = replace(checkpoint.wan_config, feature_map="hedgehog")
    maps = initial_feature_map(wan_config)
    attn1 = {**checkpoint.transformer["blocks"]["attn1"], "feature_map": maps}
    blocks = {**checkpoint.transformer["blocks"], "attn1": attn1}
    student = replace(
        checkpoint,
        config={**checkpoint.config, "linear_layers": [1], "feature_map": "hedgehog"},
        wan_config=wan_config,
        transformer={**checkpoint.transformer, "blocks": blocks},
    )
    half, settings = Pipeline(student), Settings.of(student)
    assert half.mode.tolist() == [SOFTMAX, LINEAR]
    teacher = ours.latents(PROMPTS, [0, 1], settings, 2)
    linear = half.latents(PROMPTS, [0, 1], settings, 2)
    half.mode[1] = SOFTMAX
    quadratic = half.latents(PROMPTS, [0, 1], settings, 2)
    np.testing.assert_allclose(quadratic, teacher, atol=1e-5)
    assert np.abs(linear - teacher).max() > 1e-3
