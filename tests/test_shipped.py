"""The shipped models: their sizes, diffusers' loading and sampling, what the classifier reads."""

from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from linvideo_jax import checkpoints, pipeline
from linvideo_jax.data import captions, digits
from linvideo_jax.metrics import agreement, classifier, frechet

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ASSETS / "digits_classifier"
NUM_FRAMES = 25


@pytest.fixture(scope="module")
def shipped():
    return classifier.load(SHIPPED, "pixels")


@pytest.fixture(scope="module")
def clips():
    attributes = digits.sample_attributes(np.random.default_rng(7), 48, split="test")
    video = np.asarray(digits.render(attributes, jnp.asarray(digits.digit_images())))
    return attributes, video, digits.labels_of(attributes)


@pytest.mark.parametrize(
    "name, mebibytes", [("wan_digits", 20), ("wan_digits_linear", 14), ("digits_classifier", 2)]
)
def test_shipped_folders_stay_small(name, mebibytes):
    sizes = [path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= mebibytes * 2**20


def test_diffusers_samples_the_shipped_model_as_we_do(no_warning):
    """Same prompts, same noise, trained weights, two steps with guidance: the same latents."""
    with no_warning():
        pipe = diffusers.WanPipeline.from_pretrained(ASSETS / "wan_digits")
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    checkpoint = checkpoints.load(ASSETS / "wan_digits")
    ours = pipeline.Pipeline(checkpoint)
    settings = pipeline.Settings.of(checkpoint, num_inference_steps=2)
    prompts = ["a red 3 moves slowly straight right on a green background", "the blue seven"]
    noise = pipeline.noise([0, 1], ours.latent_shape(settings))
    theirs = pipe(
        prompts,
        height=96,
        width=96,
        num_frames=25,
        num_inference_steps=2,
        guidance_scale=settings.guidance_scale,
        latents=torch.from_numpy(np.array(noise)).permute(0, 4, 1, 2, 3),
        output_type="latent",
    ).frames.permute(0, 2, 3, 4, 1)
    latents = np.asarray(ours.latents(prompts, [0, 1], settings, 2))
    assert np.linalg.norm(latents - theirs.numpy()) <= 1e-4 * np.linalg.norm(latents)


def test_shipped_student_has_half_of_the_layers_linear():
    student = checkpoints.load(ASSETS / "wan_digits_linear", ("transformer",))
    assert len(student.linear_layers) == student.wan_config.num_layers // 2


def share_right(shipped, video, said):
    return agreement.rates(agreement.agree(said, shipped.read(video).labels))


def test_shipped_reads_held_out_clips(shipped, clips):
    _, video, said = clips
    assert share_right(shipped, video, said)["all"] >= 0.93
    sentences = captions.captions(clips[0], np.random.default_rng(0))
    read = captions.stack([captions.labels(s) for s in sentences])
    assert share_right(shipped, video, read)["all"] >= 0.93


def test_shipped_ranks_corrupted_clips_below(shipped, clips):
    attributes, video, said = clips
    rng = np.random.default_rng(0)
    clean = shipped.read(video)
    rows = rng.choice(np.concatenate(digits.image_rows("test")), (len(video), 2, NUM_FRAMES))
    paths = digits.paths(attributes, NUM_FRAMES)
    changing, _ = digits.draw(attributes, jnp.asarray(digits.digit_images()[rows]), paths)
    corrupted = {
        "noise": (video + 0.5 * rng.normal(size=video.shape)).astype(np.float32),
        "frozen": np.repeat(video[:, :1], NUM_FRAMES, 1),
        "shuffled": video[:, rng.permutation(NUM_FRAMES)],
        "changing": np.asarray(changing),
    }
    half = len(video) // 2
    apart = frechet.frechet_distance(clean.features[:half], clean.features[half:])
    for name, worse in corrupted.items():
        seen = shipped.read(worse)
        assert agreement.agree(said, seen.labels)["all"].mean() < 0.5, name
        assert frechet.frechet_distance(clean.features[:half], seen.features[half:]) > apart, name
    wrong = digits.Labels(*(np.roll(field, 1, axis=0) for field in said))
    assert agreement.agree(wrong, clean.labels)["all"].mean() < 0.1
