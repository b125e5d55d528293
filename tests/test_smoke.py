"""The first minute on a new machine: stage smoke through train.py, and benchmarks/wan_step.py."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train
from benchmarks import wan_step
from linvideo_jax import config_files, rehearsal
from linvideo_jax.models import registry
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.stages import smoke

MEASURED = {
    "model": "tiny",
    "chip": "h100",
    "num_chips": 2,
    "mesh": {"data": 1, "fsdp": 2, "context": 1},
    "tokens": 32_760,
    "batch_size": 2,
    "accumulate": 1,
    "remat": "full",
    "objective": "adm",
    "first_seconds": 80.0,
    "seconds": [2.0, 1.9, 4.0],
    "losses": [1.0, 1.0, 1.0, 1.0],
    "tflop": 2000.0,
    "tflop_recomputed": 400.0,
    "mfu": 0.5,
    "memory": 40 * 2**30,
    "memory_limit": 80 * 2**30,
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of one layer, and an empty folder to be in."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "text_dim": 24}
    model = replace(
        registry.wan_digits(),
        transformer=WanConfig(num_layers=1, freq_dim=32, **sizes),
        video=(32, 32, 5),
    )
    monkeypatch.setitem(registry.MODELS, "tiny", lambda: model)
    root = wan_step.CONFIG
    monkeypatch.chdir(tmp_path)
    return [f"--config={root}", "--config.model=tiny", "--config.transfer.objective=mse"]


def test_three_updates_without_files(tiny, tmp_path, capsys):
    assert train.main(["train.py", *tiny, "--config.mesh.fsdp=1"]) == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "tiny on 1 x cpu, mesh data:1, fsdp:1, context:1" in out
    assert [f"step {step}: " in out for step in range(5)] == [True] * 4 + [False]
    assert "batch 1, 8 tokens, remat full" in out and "GiB at most" in out
    assert "it works" in out


def test_losses_that_are_not_finite_are_not_fine(tiny, monkeypatch, capsys):
    bad = MEASURED | {"losses": [1.0, float("nan")]}
    monkeypatch.setattr(smoke, "measure", lambda *given: bad)
    assert train.main(["train.py", *tiny]) == 2
    assert "does not compute right" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_steps", "samples"])
def test_counts_below_one(tiny, capsys, name):
    assert train.main(["train.py", *tiny, f"--config.smoke.{name}=0"]) == 2
    assert f"smoke.{name} is 0: choose 1 or more" in capsys.readouterr().err


def test_other_configurations_need_a_workdir(capsys):
    assert train.main(["train.py", "--config=configs/demo.py"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


def test_page_of_figures():
    page = smoke.page(MEASURED)
    for words in (
        "step: 2 s (1.9 to 4), batch 2, 32,760 tokens, remat full",
        "2e+03 TFLOP a step and 400 again; 600 TFLOP/s a chip; MFU 50.0%",
        "memory: 40.00 GiB at most, of 80.0 a chip",
    ):
        assert words in page


def test_wan_step_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    """Each case is a process; one that runs out of memory is told, and no case is run twice."""
    calls = []

    def run(command, **options):
        case = json.loads(command[-1].removeprefix("--case="))
        calls.append(case["remat"])
        if case["remat"] == "none":
            error = "Traceback\nXlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory\nmore"
            return SimpleNamespace(returncode=1, stdout="", stderr=error)
        line = "compiling\nRESULT " + json.dumps(MEASURED)
        return SimpleNamespace(returncode=0, stdout=line, stderr="")

    monkeypatch.setattr(wan_step.subprocess, "run", run)
    argv = ["wan_step.py", f"--out={tmp_path / 'step.json'}", "--remat=full,none"]
    assert wan_step.main(argv) == 0 and calls == ["full", "none"]
    assert wan_step.main(argv) == 0 and calls == ["full", "none"]
    out = capsys.readouterr().out
    assert "| 2 | 50.0% | 40.0 | 80 |" in out and "RESOURCE_EXHAUSTED: Out of memory" in out
    assert wan_step.main([*argv, "--remat=some"]) == 2


def test_it_rehearses_the_map_that_is_asked_for():
    config = config_files.load(str(wan_step.CONFIG))
    config.model = "wan_digits"
    config.transfer.feature_map = "relu"
    recipe = rehearsal.recipe(config, rehearsal.problem(config), meshes.make({}))
    assert (recipe.student.feature_map, recipe.teacher.feature_map) == ("relu", None)
