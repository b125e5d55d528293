"""Samples of the stored pairs, and points on the student's own trajectories."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax.transfer import samples

SIGMAS = np.array([1.0, 0.7, 0.4, 0.2, 0.0], np.float32)
STEPS, VIDEOS, BATCH = 4, 6, 5


class Recipe(NamedTuple):
    """What `draw` reads of the real one."""

    batch_size: int = BATCH
    t_to: str = "next"


class Knobs(NamedTuple):
    """What moves read of the real ones."""

    own_steps: int
    own_share: float = 1.0
    guidance_scale: float = 3.0
    negative_fraction: float = 0.5


@pytest.fixture
def data():
    """Pairs whose x says which they are; prompts of text 1 and 2, the negative one -1."""
    steps = np.repeat(np.arange(STEPS), VIDEOS).astype(np.int32)
    rows = np.arange(len(steps))
    shape = (len(steps), 1, 2, 2, 1)
    x = np.broadcast_to(100.0 + rows.reshape(-1, 1, 1, 1, 1), shape)
    arrays = {
        "x": x,
        "u_cond": x + 1,
        "u_neg": x - 1,
        "step": steps,
        "prompt": (rows % 2).astype(np.int32),
        "starts": np.flatnonzero(steps == 0),
        "sigmas": SIGMAS,
        "text": np.array([1.0, 2.0]).reshape(2, 1, 1) * np.ones((2, 3, 2)),
        "text_lengths": np.array([1, 2]),
        "negative_text": -np.ones((1, 3, 2)),
        "negative_length": np.array([0]),
    }
    return jax.tree.map(jnp.asarray, arrays)


def student(x, t, text, text_lengths):
    """A constant velocity: 0.1 x the prompt's text; the same for the negative branch."""
    assert text.shape[0] == text_lengths.shape[0] == x.shape[0] == 2 * BATCH
    return 0 * x + 0.1 * text[:, 0, 0][:, None, None, None, None]


@pytest.mark.parametrize("t_to", ["next", "uniform"])
def test_targets_are_lower_steps_of_the_grid(data, t_to):
    batch = samples.draw(data, Recipe(2000, t_to), 0.3, jax.random.key(0))
    index = np.searchsorted(-SIGMAS, -np.asarray(batch.t_from))
    below = np.searchsorted(-SIGMAS, -np.asarray(batch.t_to))
    assert np.all(below > index)
    assert np.all((below == STEPS) == (index == STEPS - 1))  # 0 only below the lowest step
    if t_to == "next":
        assert np.all(below == index + 1)
    else:
        counts = np.bincount(below[index == 0], minlength=STEPS)[1:]
        assert np.all(np.abs(counts / counts.sum() - 1 / 3) < 0.07)
    negative = np.asarray(batch.text[:, 0, 0]) == -1
    assert 0.25 < negative.mean() < 0.35
    offset = np.where(negative, -1, 1).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_array_equal(batch.u_teacher, batch.x + offset)


def test_the_default_draw_does_not_depend_on_the_other_choice(data):
    one, other = (samples.draw(data, Recipe(50, t), 0.3, jax.random.key(1)) for t in
                  ("next", "uniform"))  # fmt: skip
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.text, other.text)


@pytest.mark.parametrize("own_steps", [1, 2])
def test_points_are_moved_by_the_guided_student_and_begin_anew(data, own_steps):
    points, knobs = samples.no_points(data, BATCH), Knobs(own_steps)
    for i in range(12):
        before = points
        points = samples.move(points, data, student, knobs, jax.random.key(i))
        over = (before.age >= own_steps) | (before.step >= STEPS - 1)
        for j in range(BATCH):
            if points.age[j] == 0:  # a stored pair at the lowest step, which cannot move
                assert over[j] and points.step[j] == STEPS - 1
                continue
            step = int(points.step[j])
            text = float(points.prompt[j]) + 1
            guided = 0.1 * (-1 + 3.0 * (text + 1))
            moved = points.x[j, 0, 0, 0, 0] - (SIGMAS[step] - SIGMAS[step - 1]) * guided
            if over[j]:
                assert points.age[j] == 1
                row = int(jnp.round(moved - 100))
                np.testing.assert_allclose(moved, 100 + row, atol=1e-3)
                assert data["step"][row] == step - 1 and data["prompt"][row] == points.prompt[j]
            else:
                assert points.age[j] == before.age[j] + 1
                np.testing.assert_allclose(moved, before.x[j, 0, 0, 0, 0], atol=1e-3)
        assert np.all(points.age <= own_steps)


def test_whole_trajectories_begin_at_noise_and_visit_every_step(data):
    points, knobs, steps = samples.no_points(data, BATCH), Knobs(STEPS), []
    for i in range(2 * STEPS):
        points = samples.move(points, data, student, knobs, jax.random.key(i))
        np.testing.assert_array_equal(points.age, points.step)
        steps.append(np.asarray(points.step))
        if i % STEPS == 0:
            assert set((points.x[:, 0, 0, 0, 0] - 100).tolist()) <= set(range(VIDEOS))
    np.testing.assert_array_equal(steps, np.arange(2 * STEPS)[:, None] % STEPS * np.ones(BATCH))


def test_own_points_ask_the_teacher_and_have_their_share(data):
    recipe = Recipe(2000)
    batch = samples.draw(data, recipe, 0.5, jax.random.key(0))
    points = samples.no_points(data, 2000)._replace(
        step=jnp.arange(2000) % STEPS, prompt=jnp.arange(2000) % 2
    )

    def teacher(x, t, text, text_lengths):
        return x + (t * text[:, 0, 0])[:, None, None, None, None]

    mixed = samples.own_points(
        batch, points, data, teacher, Knobs(1, own_share=0.25), jax.random.key(1)
    )
    own = np.asarray(mixed.x[:, 0, 0, 0, 0]) == 0  # stored pairs are at 100 and above
    assert 0.2 < own.mean() < 0.3
    np.testing.assert_allclose(mixed.t_from[own], SIGMAS[np.arange(2000)[own] % STEPS])
    said = np.asarray(mixed.text[own, 0, 0])
    assert 0.4 < np.mean(said == -1) < 0.6
    np.testing.assert_array_equal(said[said > 0], (np.arange(2000)[own] % 2 + 1)[said > 0])
    np.testing.assert_allclose(mixed.u_teacher[own, 0, 0, 0, 0], mixed.t_from[own] * said)
    for ours, stored in zip(mixed, batch, strict=True):
        np.testing.assert_array_equal(ours[~own], stored[~own])
