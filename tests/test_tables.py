"""Tables of sweeps: from the rows' records to docs/results and the documents."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from linvideo_jax import loop
from linvideo_jax.report import chosen, tables

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables as program  # noqa: E402  (benchmarks/tables.py)

LAYERS = 4


def run(name, seed, rate, layers=None, **more):
    record = {"name": name, "seed": seed, "status": "trained", "evaluated_by": "a"}
    record |= {"figures": {"right.all": rate, "frechet": None}, "teacher": {"right.all": 0.9}}
    if layers is not None:
        target = len(layers)
        scores = [float(layer not in layers) for layer in range(LAYERS)]
        record["selection"] = {"layers": layers, "scores": scores, "target": target, "rounded": 2}
    return record | more


def table(**rows):
    rows = {name: {"changes": {}, "runs": runs} for name, runs in rows.items()}
    made = {"command": "python train.py", "device": "cpu", "jax": "0", "time": "now"}
    return {"made": made, "seeds": [0, 1], "rows": rows}


PROFILE = {
    "num_layers": LAYERS,
    "rows": [
        {"layers": [0], "error_after": 0.4},
        {"layers": [1], "error_after": 0.1},
        {"layers": [2], "error_after": 0.2},
        {"layers": [2, 3], "error_after": 0.6},
    ],
}


def test_means_spreads_and_what_is_missing():
    text = tables.markdown(
        table(
            both=[run("both", 0, 0.5), run("both", 1, 0.7)],
            one=[run("one", 1, 0.25)],
            none=[],
            lost=[{"name": "lost", "seed": 0, "status": "diverged", "diverged_at": 7}],
        )
    )
    assert text.splitlines() == [
        "|  | all right, % |",
        "| --- | --- |",
        "| teacher | 90.0 |",
        "| both | 60.0 ± 14.1 |",
        "| one (1 of 2 seeds not run) | 25.0 |",
        "| none (not run) |  |",
        "| lost (seed 0 diverged at step 7, 1 of 2 seeds not run) |  |",
    ]


def test_teachers_are_told_apart_by_how_they_were_evaluated():
    def at(frames):
        made = {"settings": {"num_frames": frames, "sampler": "unipc"}}
        return {"evaluated_by": str(frames), "made": made, "teacher": {"right.all": frames / 100}}

    text = tables.markdown(table(a=[run("a", 0, 0.5, **at(25))], b=[run("b", 0, 0.5, **at(81))]))
    assert text.splitlines()[2:4] == [
        "| teacher, num frames 25 | 25.0 |",
        "| teacher, num frames 81 | 81.0 |",
    ]


def test_rows_of_an_earlier_run_stay():
    begun = {"name": "b", "seed": 0, "status": "begun"}
    before = tables.finished(table(a=[run("a", 0, 0.1)], b=[run("b", 1, 0.2)]))
    after = tables.finished(table(a=[run("a", 0, 0.3)], b=[begun]), before)
    later = tables.finished(table(a=[run("a", 2, 0.3)]) | {"seeds": [2]}, before)
    assert later["seeds"] == [0, 1, 2]
    assert [one["seed"] for one in later["rows"]["a"]["runs"]] == [0, 2]
    rates = {
        name: [(r["seed"], r["figures"]["right.all"]) for r in row["runs"]]
        for name, row in after["rows"].items()
    }
    assert rates == {"a": [(0, 0.3)], "b": [(1, 0.2)]}


def test_agreement_of_choices_with_each_other_and_with_the_profile():
    runs = [run("s", 0, 0.5, [0, 1]), run("s", 1, 0.5, [1, 2]), run("manual", 0, 0.5)]
    assert list(chosen.layer_errors(PROFILE)) == pytest.approx([0.4, 0.1, 0.4, 0.6])
    found = chosen.agreement(runs, PROFILE)
    assert found["between_runs"] == 0.5 and found["by_chance"] == 0.5
    assert found["with_profile"] == 0.75  # the profile takes layers 1 and 2
    # Chosen 1, 2, 1, 0 times: ranks 2.5, 4, 2.5, 1 of both, but for the errors 0.4 and 0.4.
    assert found["rank_correlation"] == pytest.approx(1.0)


def test_documents_are_made_of_the_results(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    place = "Text.\n<!-- table {} -->\nold\n<!-- end -->\nMore.\n"
    (tmp_path / "README.md").write_text(place.format("plain/summary"))
    (tmp_path / "docs" / "results.md").write_text(place.format("s") + place.format("other"))
    work = tmp_path / "work"
    (work / "profile").mkdir(parents=True)
    (work / "profile" / "profile.json").write_text(json.dumps(PROFILE))
    rows = table(s=[run("s", 0, 0.5, [0, 1]), run("s", 1, 0.6, [0, 1])])
    (work / "table.json").write_text(json.dumps(rows))
    flags = [f"--workdir={work}", f"--root={tmp_path}"]
    assert program.main(["tables.py", *flags, "--name=s"]) == 0
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "| s | 55.0 ± 7.1 | 2.0 ± 0.0 |" in text and "`python train.py`; cpu" in text
    assert "<!-- table other -->\nNot run yet.\n<!-- end -->" in text and "old" not in text
    assert "where scores chose 2: between runs 1.00, with profile 0.50, by chance 0.50" in text
    assert "![s-chosen](results/s-chosen.svg)" in text
    kept = json.loads((tmp_path / "docs" / "results" / "s.json").read_text())
    assert kept["agreement"]["2"]["between_runs"] == 1.0
    svg = ElementTree.parse(tmp_path / "docs" / "results" / "s-chosen.svg").getroot()
    squares = [e for e in svg.iter() if "var(--linear)" in e.get("style", "")]
    assert len(squares) == 4

    capsys.readouterr()
    assert program.main(["tables.py", f"--workdir={tmp_path / 'none'}", "--name=x"]) == 2
    assert "run train.py there first" in capsys.readouterr().err
    assert program.main(["tables.py", f"--workdir={work}"]) == 2
    assert "--name is missing" in capsys.readouterr().err


def test_a_profile_is_a_table_of_its_ranges():
    row = {"layers": [2, 3], "error_before": 1.0, "error_after": 0.25}
    record = run("width_2", 0, 0.5) | {"profile": {"rows": [row]}}
    lines = tables.view(table(width_2=[record])).splitlines()
    assert lines[0] == "| width_2 | error before | after recovery |"
    assert lines[2] == "| 2 to 3 | 1 | 0.25 |"


def test_readmes_tables_are_those_of_docs_results():
    for name in program.DOCUMENTS:
        text = (ROOT / name).read_text()
        made = program.PLACE.sub(lambda f: program.filled(f, ROOT / "docs" / "results"), text)
        assert made == text, f"python benchmarks/tables.py makes another {name}"


def test_models_of_a_plain_run_join_a_sweep(tmp_path):
    """Without the teacher, whom the sweep has, and a word on seeds, of which it has none."""
    swept, plain = tmp_path / "swept", tmp_path / "plain"
    loop.write_json(swept / "table.json", table(few=[run("few", 0, 0.5)], begun=[]))
    entry = {"agreement": {"all": {"rate": 0.25}}, "linear_layers": []}
    metrics = {
        "made": {"config": {"seed": 0}, "command": "c", "device": "d", "jax": "1", "time": "t"},
        "contenders": {"teacher": entry, "cut": entry},
        "students": {},
    }
    loop.write_json(plain / "evaluate" / "metrics.json", metrics)
    for workdir in (swept, plain, plain, swept):
        program.bring(workdir, tmp_path / "results", "four")
    text = tables.view(loop.read_json(tmp_path / "results" / "four.json"))
    assert text.splitlines()[2:6] == [
        "| teacher | 90.0 |",
        "| few (1 of 2 seeds not run) | 50.0 |",
        "| begun (not run) |  |",
        "| cut | 25.0 |",
    ]
