"""What the shipped digits classifier reads; left out, and said so, while it is not in assets/."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.data import captions, digits
from linvideo_jax.metrics import agreement, classifier, frechet

SHIPPED = Path(__file__).parents[1] / "assets" / "digits_classifier"
NUM_FRAMES = 25


@pytest.fixture(scope="module")
def shipped():
    return classifier.load(SHIPPED, "pixels")


@pytest.fixture(scope="module")
def clips():
    attributes = digits.sample_attributes(np.random.default_rng(7), 48, split="test")
    video = np.asarray(digits.render(attributes, jnp.asarray(digits.digit_images())))
    return attributes, video, digits.labels_of(attributes)


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
