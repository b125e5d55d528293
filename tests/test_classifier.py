"""The classifier: its training step and its files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.data import digits
from linvideo_jax.errors import UserError
from linvideo_jax.metrics import classifier, classifier_training
from linvideo_jax.models.module import init, shapes


def patches(video):
    """A stand-in for the VAE's encoder: means over 4 frames and 8 x 8 px."""
    video = jnp.concatenate([jnp.repeat(video[:, :1], 3, axis=1), video], axis=1)
    b, f = video.shape[:2]
    return video.reshape(b, f // 4, 4, 12, 8, 12, 8, 3).mean((2, 4, 6))


def test_training_lowers_the_loss():
    config = classifier.ClassifierConfig(3, 1, 4, 4, width=16, depth=1, slot_width=16, moments=4)
    losses = []
    params = classifier_training.train(
        config,
        num_steps=40,
        batch_size=8,
        encode=patches,
        num_frames=(9,),
        pool_clips=32,
        learning_rate=1.5e-2,
        progress=lambda step, loss, right: losses.append(loss),
        every=5,
    )
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    figures = classifier_training.validate(
        params, config, encode=patches, num_clips=8, num_frames=9, batch_size=8
    )
    assert set(figures) == {
        "digit", "colour", "direction", "speed", "bounce", "background", "all"
    }  # fmt: skip


def test_training_clips_are_labelled_as_they_are_spoilt():
    attributes = digits.sample_attributes(np.random.default_rng(0), 64, 9)
    make = jax.jit(classifier_training.make_examples, static_argnames=("num_frames", "encode"))
    examples = make(jax.random.key(0, impl="rbg"), classifier_training._bank(), attributes, 9, None)
    truth, labels = digits.labels_of(attributes), jax.tree.map(np.asarray, examples.labels)
    there = truth.digit != digits.ABSENT
    assert (labels.digit[~there] == digits.ABSENT).all()
    spoilt = labels.digit == digits.INCONSISTENT
    assert 0.02 < spoilt[there].mean() < 0.4
    np.testing.assert_array_equal(labels.digit[there & ~spoilt], truth.digit[there & ~spoilt])
    stopped = labels.direction == classifier.NO_DIRECTION
    moving = (labels.direction != digits.UNSAID) & ~stopped
    np.testing.assert_array_equal(labels.direction[moving], truth.direction[moving])
    assert stopped.any() and np.isfinite(examples.positions[moving]).all()


def test_files_round_trip_and_name_what_is_wrong(tmp_path):
    config = replace(classifier.LATENTS, width=16, depth=1, slot_width=16)
    params = init(classifier.DigitsClassifier, config, 0)
    classifier.save(tmp_path, "latents", params, config, {"clean": 1.0})
    loaded = classifier.load(tmp_path, "latents")
    assert loaded.config == config and loaded.validation == {"clean": 1.0}
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    reading = loaded.read(np.zeros((3, 7, 12, 12, 16), np.float32))
    assert reading.labels.digit.shape == (3, 6) and reading.positions.shape == (3, 6, 7, 2)
    for kind in ("latents", "pixels"):
        (tmp_path / "latents.safetensors").write_bytes(b"short")
        with pytest.raises(UserError, match=kind):
            classifier.load(tmp_path, kind)


def test_sizes_fit_the_asset():
    count = sum(
        int(np.prod(leaf.shape))
        for config in (classifier.PIXELS, classifier.LATENTS)
        for leaf in jax.tree.leaves(shapes(classifier.DigitsClassifier, config))
    )
    assert 2 * count < 1.9 * 2**20
