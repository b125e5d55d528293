"""Metrics of digit videos: a corrupted set ranks below a clean one."""

import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.data import digits
from linvideo_jax.metrics import agreement, diversity, frechet, motion, quality

NUM_CLIPS, NUM_FRAMES = 12, 25


@pytest.fixture(scope="module")
def clips():
    attributes = digits.sample_attributes(np.random.default_rng(5), NUM_CLIPS, split="test")
    video = np.asarray(digits.render(attributes, jnp.asarray(digits.digit_images())))
    return attributes, video, digits.labels_of(attributes)


def noisy(attributes, video):
    noise = np.random.default_rng(0).normal(size=video.shape)
    return (video + 0.4 * noise).astype(np.float32)


def frozen(attributes, video):
    return np.repeat(video[:, :1], NUM_FRAMES, 1)


def shuffled(attributes, video):
    return video[:, np.random.default_rng(0).permutation(NUM_FRAMES)]


def changing(attributes, video):
    """A new digit in every frame."""
    rows = np.concatenate(digits.image_rows("test"))
    rows = np.random.default_rng(0).choice(rows, (NUM_CLIPS, 2, NUM_FRAMES))
    glyphs = jnp.asarray(digits.digit_images()[rows])
    return np.asarray(digits.draw(attributes, glyphs, digits.paths(attributes, NUM_FRAMES))[0])


def blurred(attributes, video):
    for axis in (2, 3):
        video = (np.roll(video, 1, axis) + video + np.roll(video, -1, axis)) / 3
    return video


def summary(video, said):
    figures = motion.measure(video, said)
    return {name: float(np.nanmean(value)) for name, value in figures._asdict().items()} | {
        "dynamic_degree": quality.dynamic_degree(figures.speed),
        "background_consistency": np.mean([quality.background_consistency(v) for v in video]),
        "sharpness": np.mean([quality.sharpness(v) for v in video]),
    }


def test_clean_clips(clips):
    _, video, said = clips
    figures = summary(video, said)
    assert figures["shape_correlation"] > 0.99 and figures["subject_consistency"] > 0.99
    assert figures["path_deviation"] < 0.15
    assert 0.5 < figures["speed"] < 1.7 and figures["dynamic_degree"] == 1
    assert figures["background_consistency"] > 0.999


@pytest.mark.parametrize(
    ("corrupt", "worse"),
    [
        (noisy, {"shape_correlation": -0.05, "background_consistency": -0.05, "smoothness": -0.1}),
        (noisy, {"path_deviation": 0.1}),
        (frozen, {"dynamic_degree": -0.9, "speed": -0.5}),
        (shuffled, {"path_deviation": 2.0, "smoothness": -0.4}),
        (changing, {"shape_correlation": -0.2, "subject_consistency": -0.2, "smoothness": -0.2}),
        (blurred, {"sharpness": -0.1}),
    ],
)
def test_corrupted_clips_rank_below(clips, corrupt, worse):
    attributes, video, said = clips
    clean, spoilt = summary(video, said), summary(corrupt(attributes, video), said)
    for name, least in worse.items():
        assert (spoilt[name] - clean[name]) / least > 1, (name, clean[name], spoilt[name])


def test_path_deviation_needs_the_law_that_was_said():
    time = np.arange(25.0)
    bounced = np.stack([np.abs(time - 12) + 20, 30 + 0 * time], -1)
    found = np.ones(25, bool)
    track = motion.Track(np.zeros((25, 44, 44)), bounced, found)
    assert motion.path_deviation(track, may_bounce=True) < 0.05
    assert motion.path_deviation(track, may_bounce=False) > 3
    assert np.isnan(motion.path_deviation(track._replace(found=~found), may_bounce=True))


def test_frechet_distance():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 5))
    assert abs(frechet.frechet_distance(a, a)) < 1e-8
    # Independent normals: |shift|^2 + sum (deviation - deviation')^2.
    b = rng.normal(size=(4000, 5)) * [1, 2, 1, 1, 1] + [3, 0, 0, 0, 0]
    assert abs(frechet.frechet_distance(a, b) - 10) < 0.4


def test_distance_to_the_teacher(clips):
    _, video, _ = clips
    np.testing.assert_allclose(quality.distance(video, video + 0.5), 0.5, rtol=1e-5)


def test_agreement(clips):
    _, _, said = clips
    assert agreement.rates(agreement.agree(said, said))["all"] == 1
    other = said._replace(direction=np.where(said.direction >= 0, (said.direction + 1) % 8, -1))
    rates = agreement.rates(agreement.agree(said, other))
    assert rates["direction"] == rates["all"] == 0 and rates["digit"] == rates["speed"] == 1
    unsaid = said._replace(speed=np.full_like(said.speed, digits.UNSAID))
    assert agreement.agree(unsaid, said)["all"].all()
    more = said.digit.copy()
    more[:, np.argmax(said.digit[0] == digits.ABSENT)] = 3
    assert not agreement.agree(said, said._replace(digit=more))["colour"][0]


def test_intervals():
    right = np.arange(100) < 90
    low, high = agreement.wilson(right)
    assert abs(low - 0.8256) < 1e-3 and abs(high - 0.9448) < 1e-3
    trio = [right[None], np.arange(100)[None] < 40, np.arange(100)[None] < 80]
    gap, low, high = agreement.gap_closed(*trio)
    assert abs(gap - 0.8) < 1e-9 and 0.6 < low < 0.8 < high < 1
    # Seeds that all do the same add nothing to what is known of the prompts.
    assert agreement.gap_closed(*(np.repeat(one, 3, 0) for one in trio)) == (gap, low, high)
    assert np.isnan(agreement.gap_closed(*[trio[0]] * 3)).all()


def test_diversity_falls_as_samples_of_a_prompt_collapse():
    """Normal samples of unit deviation lie sqrt(2) apart; mixed with their mean, less."""
    rng = np.random.default_rng(0)
    teachers = rng.normal(size=(3, 20, 4, 5, 50))
    spread = diversity.spread(teachers)
    assert spread.shape == (20,) and np.all(np.abs(spread - np.sqrt(2)) < 0.1)
    by_hand = [
        np.sqrt(((teachers[a, 7] - teachers[b, 7]) ** 2).mean())
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    np.testing.assert_allclose(spread[7], np.mean(by_hand), rtol=1e-5)
    assert diversity.kept(spread, spread) == (1.0, 1.0, 1.0)
    for share in (0.0, 0.6):
        collapsed = share * teachers + (1 - share) * teachers.mean(0)
        kept, low, high = diversity.kept(diversity.spread(collapsed), spread)
        assert low - 1e-6 <= kept <= high + 1e-6 and kept == pytest.approx(share, abs=1e-5)
    # All but five prompts collapsed: the interval says how little five of twenty tell.
    some = np.where(np.arange(20) < 5, spread, 0.0)
    kept, low, high = diversity.kept(some, spread)
    assert kept == pytest.approx(0.25, abs=0.02) and low < 0.15 and high > 0.4
