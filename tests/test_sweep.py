"""A sweep on the tiny teacher of test_transfer: what rows share, resume, record and refuse."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_transfer
import test_workdirs

from linvideo_jax import config_files, loop, stages, sweep
from linvideo_jax.errors import UserError
from linvideo_jax.report import rows as records
from linvideo_jax.report import tables
from linvideo_jax.stages import transfer
from linvideo_jax.transfer import training

teacher, config = test_transfer.teacher, test_transfer.config  # fixtures

ROWS = (
    ("mse", {"transfer.objective": "mse"}),
    ("two", {"transfer.objective": "mse", "transfer.target": 1, "transfer.selection": "manual",
             "transfer.layers": (2,)}),
    ("again", {"transfer.objective": "mse", "evaluate.num_frames": 13}),
)  # fmt: skip


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    """The workdir of a sweep, and what ran in it; evaluation is a file of figures."""
    own = config.copy_and_resolve_references()
    own.transfer.update(num_steps=8, warmup_steps=2, round_at=5, remat="none", save_every=100)
    own.transfer.clip_norm = 0.9  # a recipe that no other test has compiled
    own.sweep, own.sweep_seeds = ROWS, (0, 1)
    workdir, calls = tmp_path_factory.mktemp("sweep"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run", noted(calls))
        before = training.update._cache_size()
        sweep.run(own, workdir)
        compiled = training.update._cache_size() - before
    return SimpleNamespace(workdir=workdir, config=own, calls=calls, compiled=compiled)


def noted(calls, real=stages.run):
    """stages.run that notes (stages, folder), and writes made-up figures for `evaluate`."""

    def run(config, workdir, **options):
        calls.append((config.stages, workdir))
        if config.stages != ("evaluate",):
            return real(config, workdir, **options)
        rate = 0.5 + 0.1 * config.seed + 0.01 * config.transfer.target
        entry = {"agreement": {"all": {"rate": rate}}, "frechet": 2.0, "trained_here": True}
        student = entry | {"linear_layers": [0, 1], "distance_video": None}
        teacher = entry | {"agreement": {"all": {"rate": 0.9}}}
        metrics = {"contenders": {"teacher": teacher, "student": student}, "made": {"jax": "1"}}
        loop.write_json(workdir / "evaluate" / "metrics.json", metrics)

    return run


def row(swept, name, seed=0):
    return json.loads((swept.workdir / "rows" / name / f"seed{seed}" / "row.json").read_text())


def test_rows_share_the_collection_the_training_and_one_compilation(swept):
    assert swept.compiled == 1
    assert swept.calls[0] == (("collect",), swept.workdir)
    ran = [(what, folder.parent.name, folder.name) for what, folder in swept.calls[1:]]
    expected = []
    for seed in ("seed0", "seed1"):  # one seed of every row first
        for name in ("mse", "two"):
            expected += [(("transfer",), name, seed), (("evaluate",), name, seed)]
        expected.append((("evaluate",), "again", seed))
    assert ran == expected
    pairs = swept.workdir / "rows" / "two" / "seed1" / "pairs"
    assert pairs.is_symlink() and pairs.resolve() == (swept.workdir / "pairs").resolve()
    assert row(swept, "again")["losses"] == row(swept, "mse")["losses"]
    assert row(swept, "mse", 1)["losses"] != row(swept, "mse")["losses"]
    final = swept.workdir / "rows" / "again" / "seed1" / "final"
    assert (final / "config.json").exists() and not final.readlink().is_absolute()


def test_a_record_says_what_a_row_cost_and_gave(swept):
    record = row(swept, "two", 1)
    assert record["forwards"]["total"] == 3 and record["status"] == "trained"
    assert record["losses"]["velocity"] == record["losses"]["mse"] > 0
    assert set(record["updates_per_second"]) == {"warmup", "rounded"}
    assert set(row(swept, "mse")["updates_per_second"]) == {"warmup", "mixed", "rounded"}
    assert record["training_seconds"] > 0
    assert record["figures"] == {"right.all": 0.61, "frechet": 2.0}
    assert record["selection"]["layers"] == [2]
    assert row(swept, "mse")["selection"]["target"] == 2


def test_the_table_has_means_and_spreads(swept):
    table = json.loads((swept.workdir / "table.json").read_text())
    assert [len(entry["runs"]) for entry in table["rows"].values()] == [2] * 3
    lines = (swept.workdir / "table.md").read_text().splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = {line.split("|")[1].strip(): line.strip("|").split("|") for line in lines[2:]}
    assert list(cells) == ["teacher", "mse", "two", "again"]
    where = head.index("all right, %")
    assert cells["teacher"][where].strip() == "90.0"
    assert cells["mse"][where].strip() == "57.0 ± 7.1"  # 52 and 62
    assert "distance to the teacher, pixels" not in head


def test_what_is_finished_is_not_run_again(swept, monkeypatch):
    calls = []
    monkeypatch.setattr(stages, "run", noted(calls))
    sweep.run(swept.config, swept.workdir)
    assert calls == [(("collect",), swept.workdir)]
    # Evaluated otherwise, rows are not trained again; a row of the sweep can be picked by name.
    other = config_files.changed(
        swept.config,
        {"evaluate.num_prompts": 7, "sweep_rows": ("again", "two"), "sweep_seeds": (1,)},
    )
    calls.clear()
    sweep.run(other, swept.workdir)
    assert [(what, folder.parent.name) for what, folder in calls[1:]] == [
        (("evaluate",), "two"), (("evaluate",), "again"),
    ]  # fmt: skip


def test_an_interrupted_row_goes_on_and_a_diverged_one_is_recorded(
    config, swept, tmp_path, monkeypatch
):
    changes = {"sweep": ROWS[:2], "sweep_seeds": (0,), "transfer.save_every": 2}
    own = config_files.changed(swept.config, changes)
    (tmp_path / "pairs").symlink_to(swept.workdir / "pairs")
    real, state = training.update, {"killed": False}

    def update(recipe, current, teacher, data, knobs, key):
        current, metrics = real(recipe, current, teacher, data, knobs, key)
        if knobs.target == 1:
            metrics = metrics | {"loss": np.float32(np.nan)}
        if not state["killed"] and "selection.json" in state.get("seen", ""):
            raise KeyboardInterrupt
        return current, metrics

    def killed(*given):
        state["seen"] = "selection.json"
        return chosen(*given)

    chosen = transfer.chosen
    monkeypatch.setattr(stages, "run", noted([]))
    monkeypatch.setattr(training, "update", update)
    monkeypatch.setattr(transfer, "chosen", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(own, tmp_path)
    state["killed"] = True
    sweep.run(own, tmp_path)
    assert row(SimpleNamespace(workdir=tmp_path), "mse")["losses"] == row(swept, "mse")["losses"]
    record = row(SimpleNamespace(workdir=tmp_path), "two")
    assert (record["status"], record["diverged_at"]) == ("diverged", 3)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[4].startswith("| two (seed 0 diverged at step 3) |")
    three = own.copy_and_resolve_references()
    three.sweep_seeds = (0, 4, 5)
    text = tables.markdown(tables.gathered(three, tmp_path))
    assert "| mse (2 of 3 seeds not run) |" in text


def test_a_row_that_another_process_has_is_left_to_it(swept, tmp_path, monkeypatch, capsys):
    calls, own = [], config_files.changed(swept.config, {"sweep": ROWS[:2], "sweep_seeds": (0,)})
    (tmp_path / "pairs").symlink_to(swept.workdir / "pairs")
    for name in ("mse", "two"):
        done = tmp_path / "rows" / name / "seed0"
        shutil.copytree(swept.workdir / "rows" / name / "seed0", done, symlinks=True)
        loop.write_json(done / "row.json", row(swept, name) | {"evaluated_by": "other settings"})
    monkeypatch.setattr(stages, "run", noted(calls))
    lock = tmp_path / "rows" / "mse" / "seed0" / ".row"
    words = [sys.executable, "-c", test_workdirs.HOLD, str(lock)]
    with subprocess.Popen(words, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        sweep.run(own, tmp_path)
        other.kill()
    assert [folder.parent.name for what, folder in calls if what == ("evaluate",)] == ["two"]
    assert "Other processes had these rows: mse (seed 0)." in capsys.readouterr().out
    calls.clear()
    sweep.run(own, tmp_path)
    assert [folder.parent.name for what, folder in calls if what == ("evaluate",)] == ["mse"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sweep": (("a b", {}),)}, "row 'a b' cannot be a folder"),
        ({"sweep": (("a", {}), ("a", {}))}, "or is there twice"),
        ({"sweep_rows": ("mse", "none")}, "sweep_rows names none: the rows are mse, two"),
        ({"sweep": (("a", {"transfer.taget": 1}),)}, "the nearest that it has is transfer.target"),
        ({"sweep": (("a", {"transfer.target": "x"}),)}, "config.transfer.target cannot be x"),
        ({"sweep": (("a", {"transfer.target": 9}),)}, "row a: transfer.target is 9: choose 0 to 3"),
        ({"sweep": (("a", {"transfer.feature_map": "x"}),)}, "row a: transfer.feature_map is 'x'"),
        ({"transfer.lambda_": 0.5}, "holds this row under other settings: delete it, or choose"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_runs(swept, monkeypatch, changes, words):
    calls = []
    monkeypatch.setattr(stages, "run", noted(calls))
    with pytest.raises(UserError, match=words):
        sweep.run(config_files.changed(swept.config, changes), swept.workdir)
    assert calls == []


def test_a_row_collects_for_itself_if_it_changes_the_collection(swept, tmp_path):
    rows = (("own", {"collect.num_videos": 2}), ("shared", {"transfer.target": 1}))
    own = config_files.changed(swept.config, {"sweep": rows})
    by_name = {row.name: row for row in sweep.planned(own, tmp_path)}
    assert by_name["own"].stages == ("collect", "transfer", "evaluate")
    assert by_name["shared"].stages == ("transfer", "evaluate")
    assert records.read(tmp_path / "rows" / "own" / "seed0") is None


def test_rows_of_a_distillation_share_the_teacher_and_are_told_what_cannot_be(tmp_path):
    from configs.ablations import four_steps

    own = four_steps.get_config()
    rows = sweep.planned(own, tmp_path)
    assert {row.stages for row in rows} == {("distill", "evaluate")}
    assert len({row.config.evaluate.shared for row in rows}) == 1
    own.distill.log_every = 7
    with pytest.raises(UserError, match=r"row half_linear_dmd2: distill\.log_every is 7"):
        sweep.run(own, tmp_path)
    assert not any(tmp_path.iterdir())
    lines = [{"step": s, "seconds_per_step": 0.1, "fake_gradient_norm": 1.0} for s in (10, 20)]
    found = records.times(lines)
    assert found["updates_per_second"] == {"distill": 10.0}
    assert found["training_seconds"] == pytest.approx(2.0)
