"""The stage collect on a tiny random teacher: what it stores, refuses, and makes again."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from linvideo_jax import checkpoints, folders, loop
from linvideo_jax.data import loader, prompts, trajectories
from linvideo_jax.errors import UserError
from linvideo_jax.models.module import bind
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.stages import collect, profile, transfer
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import knobs_at

STEPS, VIDEOS = 3, 6


def changed(config, **fields):
    """A copy with fields of `collect` changed."""
    copy = config.copy_and_resolve_references()
    copy.collect.update(fields)
    return copy


@pytest.fixture(scope="module")
def collected(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("collected")
    collect.run(tiny_config, workdir)
    return workdir


@pytest.fixture
def copy(collected, tmp_path):
    """A folder like `collected`, to be damaged."""
    (tmp_path / "pairs").mkdir()
    for path in sorted((collected / "pairs").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        (tmp_path / "pairs" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(workdir):
    """Every file's bytes, but for the seconds that its pairs took."""
    files = {path.name: path.read_bytes() for path in (workdir / "pairs").iterdir()}
    return {name: re.sub(rb'"seconds": [^}]*', b"", content) for name, content in files.items()}


def test_pairs_hold_the_teachers_velocities(tiny_config, collected, tiny_teacher):
    pairs = trajectories.open_folder(epath.Path(collected / "pairs"))
    assert len(pairs) == VIDEOS * STEPS
    loaded = checkpoints.load(tiny_teacher)
    model = bind(WanTransformer, loaded.wan_config, loaded.transformer)
    rows = (1, 7, 16)
    heads, states = zip(*(pairs.x(row) for row in rows), strict=True)
    assert [head.prompt for head in heads] == [0, 2, 2] and heads[1].step == 1
    times = np.floor(1000 * np.float32(pairs.index.sigmas))[[head.step for head in heads]]
    for negative in (False, True):
        ids = [pairs.texts.negative if negative else head.prompt for head in heads]
        text, lengths = (np.stack(a) for a in zip(*(pairs.texts[i] for i in ids), strict=True))
        u = model(jnp.asarray(states, jnp.float32), jnp.asarray(times), text, lengths)
        stored = np.stack([pairs.velocity(row, negative) for row in rows]).astype(np.float32)
        # Pairs are bfloat16: x is rounded before the velocity is taken again here.
        assert np.linalg.norm(u - stored) < 0.03 * np.linalg.norm(stored)


def test_first_states_are_the_seeds_noise_and_later_ones_move_by_guidance(collected):
    pairs = trajectories.open_folder(epath.Path(collected / "pairs"))
    sigmas = pairs.index.sigmas
    assert len({pairs.x(row)[0].seed for row in range(len(pairs))}) == VIDEOS
    for row in range(0, len(pairs), STEPS):
        (head, first), (_, second) = (pairs.x(row + i) for i in range(2))
        noise = jax.random.normal(jax.random.key(head.seed), first.shape)
        np.testing.assert_allclose(first.astype(np.float32), noise, atol=0.02)
        u_cond, u_neg = (pairs.velocity(row, side).astype(np.float32) for side in (False, True))
        guided = u_neg + 2.0 * (u_cond - u_neg)
        # UniPC's first step is of order 1, which for a flow is Euler's.
        moved = first.astype(np.float32) + (sigmas[1] - sigmas[0]) * guided
        np.testing.assert_allclose(second.astype(np.float32), moved, atol=0.05)


def test_only_missing_and_damaged_files_are_made_again(tiny_config, collected, copy, capsys):
    folder = epath.Path(copy / "pairs")
    kept, damaged, missing = (trajectories.shard_path(folder, i) for i in range(3))
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"different")
    os.utime(damaged, (2**31, 2**31))
    missing.unlink()
    stamp = os.stat(kept).st_mtime_ns
    collect.run(tiny_config, copy)
    out = capsys.readouterr().out
    assert "collect: pairs-00001.arrayrecord cannot be read or were never finished" in out
    assert "12 pairs in 2 files of" in out and "GB on disk" in out
    assert "s for the first file's 2 videos, so the other 1 take about" in out
    assert os.stat(kept).st_mtime_ns == stamp
    assert contents(copy) == contents(collected)
    collect.run(tiny_config, copy)
    assert capsys.readouterr().out == ""


def test_a_stop_loses_the_file_that_was_being_made_alone(
    tiny_config, collected, tmp_path, monkeypatch
):
    rolled, make = [], collect.Teacher.trajectories

    def killed(self, first):
        rolled.append(first)
        if first == 4:
            raise KeyboardInterrupt
        return make(self, first)

    monkeypatch.setattr(collect.Teacher, "trajectories", killed)
    with pytest.raises(KeyboardInterrupt):
        collect.run(tiny_config, tmp_path)
    monkeypatch.setattr(collect.Teacher, "trajectories", make)
    # What a kill leaves beside the files.
    (tmp_path / "pairs" / ".pairs-00002.arrayrecord.part").write_bytes(b"half")
    assert len(list((tmp_path / "pairs").glob("pairs-*.arrayrecord"))) == 2
    with pytest.raises(UserError, match=r"lacks pairs-00002\.arrayrecord, or"):
        collect.opened(tiny_config, tmp_path, checkpoints.load(tiny_config.checkpoint), 4)
    collect.run(tiny_config, tmp_path)
    assert contents(tmp_path) == contents(collected)


def test_processes_share_the_work(tiny_config, collected, tmp_path, capsys):
    for process in (1, 0):
        collect.run(tiny_config, tmp_path, process, 2)
        out = capsys.readouterr().out
        assert ("1 by this process" in out) == (process == 1)
    assert contents(tmp_path) == contents(collected)


def test_a_collection_can_be_extended_and_shared(tiny_config, collected, copy):
    more = changed(tiny_config, num_videos=7, folder=str(copy / "pairs"))
    collect.run(more, copy / "elsewhere")
    before, after = contents(collected), contents(copy)
    assert sorted(after.keys() - before.keys()) == ["pairs-00003.arrayrecord", "pairs-00003.json"]
    assert all(after[name] == before[name] for name in before if name != "index.json")
    teacher = checkpoints.load(tiny_config.checkpoint)
    assert len(collect.opened(more, copy / "elsewhere", teacher, 4)) == 7 * STEPS
    collect.run(tiny_config, copy)  # of which this one takes its part
    assert contents(copy) == after
    assert len(collect.opened(tiny_config, copy, teacher, 4)) == VIDEOS * STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.collect.sampling.update(guidance_scale=3.0), "guidance_scale 2.0 there, 3.0"),
        (lambda c: c.collect.sampling.update(num_inference_steps=4), "steps 3 there, 4 now"),
        (lambda c: c.collect.sampling.update(height=32), "height 16 there, 32 now"),
        (lambda c: c.update(seed=1), "seed 0 there, 1 now"),
        (lambda c: c.collect.update(batch_size=3), "batch_size 2 there, 3 now"),
        (lambda c: c.collect.update(store_velocity="none"), "store_velocity 'both' there, 'none'"),
        (lambda c: c.update(prompts="assets/prompts_digits_test.txt"), "prompts '"),
    ],
)
def test_pairs_that_were_made_otherwise_are_refused(tiny_config, collected, change, message):
    other = tiny_config.copy_and_resolve_references()
    with other.collect.sampling.unlocked():
        change(other)
    before = contents(collected)
    with pytest.raises(UserError, match="holds pairs that were made otherwise") as refused:
        collect.run(other, collected)
    assert message in str(refused.value) and contents(collected) == before


def test_pairs_of_another_model_or_size_are_refused_by_the_training(tiny_config, collected):
    teacher = checkpoints.load(tiny_config.checkpoint)
    other = jax.tree.map(lambda leaf: leaf + 1, teacher.transformer)
    with pytest.raises(UserError, match=r"made otherwise \(transformer '\w+' there"):
        collect.opened(tiny_config, collected, dataclasses.replace(teacher, transformer=other), 4)
    sizes = dataclasses.replace(teacher.wan_config, num_layers=4)
    with pytest.raises(UserError, match=r"\(sizes\.num_layers 3 there, 4 now\)"):
        collect.opened(tiny_config, collected, dataclasses.replace(teacher, wan_config=sizes), 4)
    smaller = tiny_config.copy_and_resolve_references()
    with smaller.collect.sampling.unlocked():
        smaller.collect.sampling.update(num_frames=9)
    with pytest.raises(UserError, match=r"num_frames 5 there, 9 now"):
        collect.opened(smaller, collected, teacher, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "both"}, "collect.mode is 'both': choose one of stored, online"),
        ({"store_velocity": "all"}, "store_velocity is 'all': choose one of both, cond, none"),
        ({"batch_size": 0}, "collect.batch_size is 0: choose 1 or more"),
        ({"reuse": 0.0}, "collect.reuse is 0.0: choose a number above 0"),
    ],
)
def test_wrong_settings_are_refused(tiny_config, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        collect.run(changed(tiny_config, **fields), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    tiny_config, tmp_path, monkeypatch
):
    disk = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: disk._replace(free=50_000))
    with pytest.raises(UserError, match=r"pairs needs 0\.0 GB, but its disk has 0\.0 GB free"):
        collect.run(tiny_config, tmp_path)
    assert list((tmp_path / "pairs").glob("pairs-*")) == []


def test_a_teacher_with_linear_layers_is_refused(tiny_config, tmp_path):
    own = tiny_config.copy_and_resolve_references()
    own.checkpoint = "assets/wan_digits_linear"
    with pytest.raises(UserError, match="wan_digits_linear has linear layers"):
        collect.run(own, tmp_path)


def test_prompts_that_are_no_text_are_refused(tiny_config, tmp_path):
    path, own = tmp_path / "prompts.txt", tiny_config.copy_and_resolve_references()
    own.prompts = str(path)
    for content, message in (
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\0b\n", "is no text, but binary data"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            collect.run(own, tmp_path)


def test_the_shipped_prompts_are_a_thousand_different_sentences():
    path = Path(__file__).parents[1] / "assets" / "prompts.txt"
    found = prompts.read(path)
    assert len(found) == len({re.sub(r"\W", "", line.lower()) for line in found}) == 1000
    assert all(8 <= len(line.split()) <= 60 and line.isascii() for line in found)
    assert path.stat().st_size < 150_000


def anchors(config, workdir, teacher, steps, **options):
    """The metrics of a few updates with ADM and the final state, from `config` in `workdir`."""
    settings = config.transfer.copy_and_resolve_references()
    settings.objective = "adm"
    pairs = collect.opened(config, workdir, teacher, settings.batch_size)
    recipe = transfer.recipe_of(config, settings, pairs.index, teacher)
    dataset = transfer.samples_of(pairs, recipe, settings, config.seed)
    state = training.initial_state(settings, recipe.student, teacher.transformer)
    seen = []

    def step(state, i, batch):
        knobs = knobs_at(settings, 8 + i, 1e-3, 2.0, True)
        state, metrics = training.update(
            recipe, state, teacher.transformer, batch, knobs, jax.random.key(i)
        )
        seen.append(metrics)
        return state, metrics

    data = loader.batches(dataset, settings.batch_size, num_threads=pairs.num_threads)
    options = {"save_every": 2, "log_every": 1, "folder": workdir / "state"} | options
    state = loop.run("test", step, state, num_steps=steps, data=data, **options)
    return recipe, seen, state


def test_velocities_that_are_not_stored_cost_a_forward_or_are_not_needed(
    tiny_config, tmp_path, collected
):
    teacher = checkpoints.load(tiny_config.checkpoint)
    lean = changed(tiny_config, store_velocity="none")
    collect.run(lean, tmp_path)
    sizes = [trajectories.read_index(epath.Path(w / "pairs")).pair_bytes - 24 for w in
             (collected, tmp_path)]  # fmt: skip
    assert sizes[0] == 3 * sizes[1]
    _, stored, _ = anchors(tiny_config, collected, teacher, 1, folder=tmp_path / "a")
    recipe, asked, _ = anchors(lean, tmp_path, teacher, 1, folder=tmp_path / "b")
    assert recipe.velocity == "teacher"
    for name in ("anchor", "adm"):
        np.testing.assert_allclose(asked[0][name], stored[0][name], rtol=0.03)

    lean.transfer.update({"objective": "adm", "beta": 0.0})
    pairs = collect.opened(lean, tmp_path, teacher, 4)
    assert transfer.recipe_of(lean, lean.transfer, pairs.index, teacher).velocity == "unused"
    half = dataclasses.replace(pairs.index, made={**pairs.index.made, "store_velocity": "cond"})
    assert transfer.recipe_of(lean, lean.transfer, half, teacher).velocity == "unused"
    lean.transfer.beta = 1.0
    with pytest.raises(UserError, match="store_velocity is 'cond', but transfer"):
        transfer.recipe_of(lean, lean.transfer, half, teacher)
    lean.transfer.negative_fraction = 0.0
    assert transfer.recipe_of(lean, lean.transfer, half, teacher).velocity == "stored"


def test_online_stores_nothing_and_resumes_bit_for_bit(tiny_config, tmp_path, capsys):
    teacher = checkpoints.load(tiny_config.checkpoint)
    online = changed(tiny_config, mode="online", buffer=2, reuse=1.4)
    collect.run(online, tmp_path)
    assert list(tmp_path.iterdir()) == []
    _, _, undisturbed = anchors(online, tmp_path, teacher, 5, folder=tmp_path / "a")
    assert "makes 2 videos every 2 updates; 2 such rounds" in capsys.readouterr().out
    anchors(online, tmp_path, teacher, 3, folder=tmp_path / "b")
    _, seen, resumed = anchors(online, tmp_path, teacher, 5, folder=tmp_path / "b")
    assert len(seen) == 2
    jax.tree.map(np.testing.assert_array_equal, undisturbed, resumed)
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(UserError, match="the profile stage needs stored pairs"):
        profile.run(online, tmp_path)
