"""The generator of moving digits and its captions."""

import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.data import captions, digits


@pytest.fixture(scope="module")
def clips():
    return digits.sample_attributes(np.random.default_rng(0), 20_000)


def test_splits_share_neither_combinations_nor_images(clips):
    test = digits.sample_attributes(np.random.default_rng(0), 20_000, split="test")

    def drawn(a):
        there = a.digit >= 0
        ground = np.broadcast_to(a.background[:, None], a.digit.shape)
        rows = np.stack([a.digit, a.colour, a.direction, ground, a.image], -1)[there]
        return set(map(tuple, rows[:, :4].tolist())), set(rows[:, 4].tolist())

    for ours, theirs in zip(drawn(clips), drawn(test), strict=True):
        assert ours and theirs and not ours & theirs
    assert 0.04 < len(digits.combinations("test")) / 1920 < 0.06
    assert (clips.colour[:, 0] != clips.colour[:, 1]).all()
    assert abs((clips.digit[:, 1] >= 0).mean() - 0.3) < 0.02


@pytest.mark.parametrize("num_frames", [25, 81])
def test_motion_law(num_frames):
    a = digits.sample_attributes(np.random.default_rng(1), 5_000, num_frames)
    centre = digits.paths(a, num_frames)
    margin = a.size[:, :, None, None] / 2
    assert (centre >= margin - 1e-3).all() and (centre <= digits.FRAME - margin + 1e-3).all()
    line = a.start[:, :, None] + a.velocity[:, :, None] * np.arange(num_frames)[:, None]
    deviation = np.abs(centre - line).max((-1, -2))
    assert deviation[a.bounce == 0].max() < 1e-3
    assert deviation[a.bounce == 1].min() > 4
    # The first leg is long enough to show the direction.
    leg = int(digits.FIRST_WALL[0] * (num_frames - 1))
    np.testing.assert_allclose(centre[:, :, leg], line[:, :, leg], atol=1e-3)
    if num_frames == 81:
        assert a.bounce[a.speed == 1].all()


def test_render_places_ink_below_a_pixel(clips):
    a = clips.take(np.flatnonzero(clips.digit[:, 1] < 0)[:8])
    video, mask = digits.render(a, jnp.asarray(digits.digit_images()), 25, mask=True)
    assert video.shape == (8, 25, 96, 96, 3) and mask.shape == (8, 25, 96, 96)
    assert float(jnp.abs(video).max()) <= 1
    ground = np.array(list(digits.BACKGROUNDS.values()))[a.background] / 127.5 - 1
    ink = np.abs(np.asarray(video) - ground[:, None, None, None]).sum(-1)
    grid = np.arange(digits.FRAME) + 0.5
    x = (ink * grid).sum((2, 3)) / ink.sum((2, 3))
    y = (ink * grid[:, None]).sum((2, 3)) / ink.sum((2, 3))
    seen = np.stack([x, y], -1)
    law = digits.paths(a, 25)[:, 0]
    np.testing.assert_allclose(seen - seen[:, :1], law - law[:, :1], atol=0.15)


def test_captions_read_back(clips):
    sentences = captions.captions(clips, np.random.default_rng(2))
    said = captions.stack([captions.labels(s) for s in sentences])
    for ours, read in zip(digits.labels_of(clips), said, strict=True):
        np.testing.assert_array_equal(ours, read)
    words = {w for s in sentences for w in s.replace(",", "").split()}
    assert words == set(captions.vocabulary())
    assert max(len(s.replace(",", " ,").split()) for s in sentences) <= captions.MAX_WORDS
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert captions.caption(clips, np.random.default_rng(0), 7) in captions.captions(
        clips.take([7]), np.random.default_rng(0)
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "a red dragon moves up on a green background",
        "a red moves up on a green background",
        "a red 3 moves up and down on a green background",
        "a red 3 moves up and a red 4 moves down on a green background",
        "a red 3 moves up",
        "a red 3 moves slowly and quickly up on a green background",
        "a red 3 and a blue 4 and a white 5 go up on a black background",
    ],
)
def test_unreadable_sentences(sentence):
    assert captions.labels(sentence) is None


def test_open_attributes_are_unsaid():
    read = captions.labels("A red 3 moves right and a blue 7 moves up on a green background.")
    assert read.digit.tolist() == [3, 10, 10, 7, 10, 10]
    assert read.direction[[0, 3]].tolist() == [0, 2]
    assert (read.speed == -1).all() and (read.bounce == -1).all() and read.background == 2


def test_prompt_file_is_reproducible(tmp_path):
    for name in ("a", "b"):
        captions.write_prompts(tmp_path / name, 50, "test", seed=2)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert len(set((tmp_path / "a").read_text().splitlines())) == 50
