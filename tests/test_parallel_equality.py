"""Eight devices compute what one does; what they send, and where arrays lie.

The devices are XLA's simulated ones, in one process of their own (parallel_cases.py): the other
tests have one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_cases
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "out.json"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # Threads: with one a core, devices that wait in two collectives at once leave none.
        "NPROC": "32",
    }
    words = [sys.executable, str(ROOT / "tests" / "parallel_cases.py"), str(path)]
    made = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("what", ["forward", "gradients", "losses", "params"])
@pytest.mark.parametrize("name", parallel_cases.CASES)
def test_a_mesh_computes_what_one_device_does(found, name, what):
    if what == "forward" and "context" not in parallel_cases.CASES[name][0]:
        assert what not in found[name]
    else:
        assert found[name][what] < 1e-5


@pytest.mark.parametrize("name", parallel_cases.CASES)
def test_a_state_stays_where_the_table_has_it(found, name):
    assert found[name]["as_the_table_says"]
    sizes = parallel_cases.CASES[name][0]
    parts = sizes.get("fsdp", 1) * sizes.get("context", 1)
    assert found[name]["largest_shard"] == pytest.approx(1 / parts)


def test_what_a_linear_layer_sends_does_not_grow_with_the_tokens(found):
    few, many = (found[f"linear {tokens}"] for tokens in (62, 254))
    assert few == many and list(few) == ["all-reduce"]
    features = head_dim = 8
    state = parallel_cases.HEADS * features * (head_dim + 1) * 4  # float32, and once more backward
    assert state <= few["all-reduce"] < 6 * state
    for exchange, kind in (("ulysses", "all-to-all"), ("ring", "collective-permute")):
        few, many = (found[f"{exchange} {tokens}"] for tokens in (62, 254))
        assert many[kind] == 4 * few[kind] > 0


def test_the_benchmark_of_two_gpus_finds_what_layers_send(found):
    layers = found["two_gpus"]["bytes"]["layers"]
    assert [list(row["kinds"]) for row in layers.values()] == [
        ["all-to-all"], ["all-reduce"], ["collective-permute"], ["all-to-all"], ["all-reduce"],
    ]  # fmt: skip
    for name, row in layers.items():
        # A CPU's collectives send what is bfloat16 as float32.
        wider = 1 if "linear" in name else 2
        assert row["measured"] == pytest.approx(wider * row["formula"])
    rest = found["two_gpus"]["bytes"]["rest_of_a_forward"]
    assert [list(kinds) for kinds in rest.values()] == [["all-gather"]] * 3


def test_the_benchmark_of_two_gpus_compares_with_one(found):
    figures = found["two_gpus"]["equality"]
    own = figures["to_float32"]["one GPU"]
    assert 1e-4 < own < 0.05 and figures["to_float32"]["float32"] == 0
    assert all(error <= own for error in figures["to_one"].values())


def test_sampling_does_not_depend_on_the_mesh(found):
    assert found["latents on {'context': 4}"] < 1e-5
    assert found["latents on {'data': 4, 'fsdp': 2}"] < 1e-5


def test_the_vae_decodes_by_parts_of_the_picture(found):
    assert found["share of a video"] == 1 / 8
    assert found["noise in pixels"] <= 1 < found["spread of pixels"]


def test_a_state_is_restored_on_another_mesh_and_on_one_device(found):
    assert found["restored on another mesh"] and found["restored on another device"]
