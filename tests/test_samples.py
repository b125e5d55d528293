"""Samples of the stored pairs, and points on the student's own trajectories."""

from types import SimpleNamespace
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from linvideo_jax.data import loader
from linvideo_jax.data.texts import Texts
from linvideo_jax.data.trajectories import Head
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.layout import MeshLayout
from linvideo_jax.transfer import samples
from linvideo_jax.transfer.recipe import points_of

SIGMAS = (1.0, 0.7, 0.4, 0.2, 0.0)
STEPS, VIDEOS, BATCH = 4, 6, 5


class Recipe(NamedTuple):
    """What draws and moves read of the real one."""

    batch_size: int = BATCH
    t_to: str = "next"
    objective: str = "adm"
    velocity: str = "stored"
    sigmas: tuple = SIGMAS
    steps: int = STEPS
    has_score_network: bool = False
    score_updates: int = 3
    num_points: int = BATCH
    layout: object = None


class Knobs(NamedTuple):
    """What moves read of the real ones."""

    own_steps: int
    own_share: float = 1.0
    guidance_scale: float = 3.0
    negative_fraction: float = 0.5


class Pairs:
    """Pairs whose x says which they are; prompts of text 1 and 2, the negative one -1."""

    texts = Texts([np.full((1, 2), v, np.float32).tobytes() for v in (1, 2, -1)], (3, 2), "float32")

    def __len__(self):
        return VIDEOS * STEPS

    def order(self, seed, batch_size):
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()

    def another(self, row, rng):
        return int(rng.integers(len(self)))

    def x(self, row):
        return Head(0, row // STEPS % 2, row % STEPS), np.full((1, 2, 2, 1), 100.0 + row)

    def velocity(self, row, negative):
        return self.x(row)[1] + (-1 if negative else 1)


def batches(recipe, negative_fraction=0.3, own_steps=1, seed=0):
    """The iterator of batches that a training has."""
    draw = samples.Draw(Pairs(), recipe, negative_fraction, own_steps)
    dataset = loader.samples(Pairs(), draw, seed, recipe.batch_size)
    return loader.batches(dataset, recipe.batch_size, num_threads=0)


def student(x, t, text, text_lengths):
    """A constant velocity: 0.1 x the prompt's text; the same for the negative branch."""
    assert text.shape[0] == text_lengths.shape[0] == x.shape[0] == 2 * BATCH
    return 0 * x + 0.1 * text[:, 0, 0][:, None, None, None, None]


@pytest.mark.parametrize("t_to", ["next", "uniform"])
def test_targets_are_lower_steps_of_the_grid(t_to):
    batch = next(batches(Recipe(2000, t_to)))
    sigmas = np.array(SIGMAS, np.float32)
    index = np.searchsorted(-sigmas, -batch.t_from)
    np.testing.assert_array_equal(index, (batch.x[:, 0, 0, 0, 0] - 100) % STEPS)
    below = np.searchsorted(-sigmas, -batch.t_to)
    assert np.all(below > index)
    assert np.all((below == STEPS) == (index == STEPS - 1))  # 0 only below the lowest step
    if t_to == "next":
        assert np.all(below == index + 1)
    else:
        counts = np.bincount(below[index == 0], minlength=STEPS)[1:]
        assert np.all(np.abs(counts / counts.sum() - 1 / 3) < 0.07)
    negative = batch.text[:, 0, 0] == -1
    assert 0.25 < negative.mean() < 0.35
    offset = np.where(negative, -1, 1).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_array_equal(batch.u_teacher, batch.x + offset)
    assert np.all(batch.text_lengths == 1) and np.all(batch.text[:, 1:] == 0)


def test_the_default_draw_does_not_depend_on_the_other_choice():
    one, other = (next(batches(Recipe(50, t))) for t in ("next", "uniform"))
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.text, other.text)


def test_a_score_network_has_samples_of_its_own():
    batch = next(batches(Recipe(400, has_score_network=True)))
    assert batch.others.x.shape == (400, 3, 1, 2, 2, 1) and batch.others.u_teacher is None
    rows = np.concatenate([batch.x[:, None], batch.others.x], 1)[..., 0, 0, 0, 0].T
    assert all(abs(np.corrcoef(rows)[np.triu_indices(4, 1)]) < 0.2)
    steps = (batch.others.x[..., 0, 0, 0, 0] - 100).astype(int) % STEPS
    np.testing.assert_array_equal(batch.others.t_from, np.array(SIGMAS, np.float32)[steps])


def test_velocities_that_are_not_stored_are_not_read():
    assert next(batches(Recipe(velocity="teacher"))).u_teacher is None


@pytest.mark.parametrize("own_steps", [1, 2])
def test_points_are_moved_by_the_guided_student_and_begin_anew(own_steps):
    recipe, knobs = Recipe(objective="own_points"), Knobs(own_steps)
    points = samples.no_points(recipe, (1, 2, 2, 1), (3, 2))
    for batch, _ in zip(batches(recipe, own_steps=own_steps), range(12), strict=False):
        before, fresh = points, batch.fresh
        points = samples.move(points, fresh, recipe, student, knobs)
        over = (before.age >= own_steps) | (before.step >= STEPS - 1)
        for j in range(BATCH):
            row = int(fresh.x[j, 0, 0, 0, 0]) - 100
            if points.age[j] == 0:  # a stored pair at the lowest step, which cannot move
                assert over[j] and points.step[j] == STEPS - 1 and row % STEPS == STEPS - 1
                continue
            step = int(points.step[j])
            guided = 0.1 * (-1 + 3.0 * (float(points.text[j, 0, 0]) + 1))
            moved = points.x[j, 0, 0, 0, 0] - (SIGMAS[step] - SIGMAS[step - 1]) * guided
            if over[j]:
                assert points.age[j] == 1 and row % STEPS == step - 1
                np.testing.assert_allclose(moved, 100 + row, atol=1e-3)
                assert points.text[j, 0, 0] == row // STEPS % 2 + 1
            else:
                assert points.age[j] == before.age[j] + 1
                np.testing.assert_allclose(moved, before.x[j, 0, 0, 0, 0], atol=1e-3)
        assert np.all(points.age <= own_steps)


def test_whole_trajectories_begin_at_noise_and_visit_every_step():
    recipe, knobs, steps = Recipe(objective="own_points"), Knobs(STEPS), []
    points, stream = (
        samples.no_points(recipe, (1, 2, 2, 1), (3, 2)),
        batches(recipe, own_steps=STEPS),
    )
    for i in range(2 * STEPS):
        points = samples.move(points, next(stream).fresh, recipe, student, knobs)
        np.testing.assert_array_equal(points.age, points.step)
        steps.append(np.asarray(points.step))
        if i % STEPS == 0:
            starts = {100 + STEPS * video for video in range(VIDEOS)}
            assert set(points.x[:, 0, 0, 0, 0].tolist()) <= starts
    np.testing.assert_array_equal(steps, np.arange(2 * STEPS)[:, None] % STEPS * np.ones(BATCH))


@pytest.mark.parametrize("velocity", ["stored", "teacher"])
def test_own_points_ask_the_teacher_and_have_their_share(velocity):
    recipe = Recipe(2000, objective="own_points", velocity=velocity, num_points=1000)
    batch = jax.tree.map(jnp.asarray, next(batches(recipe, 0.5)))
    prompt = np.arange(1000) % 2
    points = samples.with_points(recipe, samples.no_points(recipe, (1, 2, 2, 1), (3, 2)))
    points = points._replace(
        step=jnp.arange(1000) % STEPS,
        text=jnp.ones((1000, 3, 2)) * (prompt + 1).reshape(-1, 1, 1),
        text_lengths=jnp.ones(1000, jnp.int32),
    )

    def teacher(x, t, text, text_lengths):
        assert len(x) == 1000  # of the samples that keep a point
        return x + (t * text[:, 0, 0])[:, None, None, None, None]

    batch, fresh = batch._replace(fresh=None), samples.with_points(recipe, batch.fresh)
    mixed = samples.own_points(
        batch, points, fresh, recipe, teacher, Knobs(1, own_share=0.125), jax.random.key(1)
    )
    own = np.asarray(mixed.x[:, 0, 0, 0, 0]) == 0  # stored pairs are at 100 and above
    assert 0.2 < own[:1000].mean() < 0.3 and not own[1000:].any()  # 0.125 of all samples
    t = np.array(SIGMAS)[np.flatnonzero(own) % STEPS]
    np.testing.assert_allclose(mixed.t_from[own], t, rtol=1e-6)
    said = np.asarray(mixed.text[own, 0, 0])
    assert 0.4 < np.mean(said == -1) < 0.6
    np.testing.assert_array_equal(said[said > 0], (prompt[own[:1000]] + 1)[said > 0])
    if velocity == "stored":
        np.testing.assert_allclose(mixed.u_teacher[own, 0, 0, 0, 0], mixed.t_from[own] * said)
    else:  # `training.update` asks the teacher at all of them
        assert mixed.u_teacher is None
    for ours, stored in zip(jax.tree.leaves(mixed), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(ours[~own], stored[~own])


def test_every_block_of_a_batch_keeps_as_many_points():
    layout = MeshLayout(AbstractMesh((2, 3, 2), meshes.AXES), "auto")
    assert [layout.blocks(batch) for batch in (12, 16, 5)] == [6, 2, 1]  # as the batch is shared
    two = MeshLayout(AbstractMesh((2, 1, 4), meshes.AXES), "auto")
    own = SimpleNamespace(objective="own_points", batch_size=12, own_share=0.2)
    assert points_of(own, None) == 3 and points_of(own, two) == 4
    own.own_share = 0.25  # a whole number, which floats miss by little
    assert points_of(own, None) == 3
    own.objective = "mse"
    assert points_of(own, None) == 0
    recipe = Recipe(12, num_points=4, layout=two)
    batch = {"x": jnp.arange(24.0).reshape(12, 2), "t": jnp.arange(12)}
    kept = samples.with_points(recipe, batch)
    np.testing.assert_array_equal(kept["t"], [0, 1, 6, 7])
    np.testing.assert_array_equal(kept["x"], np.arange(24.0).reshape(12, 2)[[0, 1, 6, 7]])
    put = samples.replaced(recipe, batch, jax.tree.map(lambda leaf: leaf + 100, kept))
    np.testing.assert_array_equal(put["t"], [100, 101, 2, 3, 4, 5, 106, 107, 8, 9, 10, 11])
