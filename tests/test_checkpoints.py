"""Our checkpoint folder: what is on disk, what is loaded, and what an interrupted save leaves."""

import json
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from linvideo_jax import checkpoints, folders
from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.wan import WanConfig, WanTransformer, initial_feature_map

WAN = WanConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    ffn_dim=48,
    feature_map="hedgehog",
)


def same(a, b) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    )


@pytest.fixture(scope="module")
def transformer():
    """Random parameters, biases and feature maps too."""
    shapes = module.shapes(WanTransformer, WAN)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def student(tmp_path, transformer):
    """A saved transformer whose layers 0 and 2 are linear."""
    config = checkpoints.make_config(WAN, linear_layers=(2, 0), sampling={"guidance_scale": 2.0})
    checkpoints.save(tmp_path / "student", config=config, transformer=transformer)
    return tmp_path / "student"


def test_one_array_per_layer_and_parameter_on_disk(student, transformer):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(student / "transformer")
    assert sorted(tree["blocks"]) == ["0", "1", "2"]
    kernel = tree["blocks"]["1"]["attn1"]["to_q"]["kernel"]
    np.testing.assert_array_equal(kernel, transformer["blocks"]["attn1"]["to_q"]["kernel"][1])
    has_map = ["feature_map" in tree["blocks"][layer]["attn1"] for layer in "012"]
    assert has_map == [True, False, True], "feature maps of the linear layers only"


def test_load_stacks_and_fills_feature_maps_of_other_layers(student, transformer):
    loaded = checkpoints.load(student, parts=("transformer",))
    assert (loaded.linear_layers, loaded.wan_config) == ((0, 2), WAN)
    assert loaded.sampling == {
        "sampler": "unipc",
        "num_inference_steps": 50,
        "guidance_scale": 2.0,
        "flow_shift": 3.0,
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "time_grid": "diffusers",
        "negative_prompt": "",
        "denoising_steps": None,
    }
    assert loaded.vae is None and loaded.text_encoder is None and loaded.tokenizer is None
    initial = initial_feature_map(WAN)
    for name, weights in loaded.transformer["blocks"]["attn1"].pop("feature_map").items():
        saved = transformer["blocks"]["attn1"]["feature_map"][name]
        np.testing.assert_array_equal(weights, [saved[0], initial[name][1], saved[2]])
    plain = dict(transformer["blocks"]["attn1"])
    del plain["feature_map"]
    expected = {**transformer, "blocks": {**transformer["blocks"], "attn1": plain}}
    assert same(loaded.transformer, expected)


def test_whole_checkpoint_round_trip(tiny_pipeline, tmp_path):
    """Every part from diffusers' folder, saved and loaded: the same numbers and trees."""
    first = checkpoints.load(tiny_pipeline.folder)
    parts = {"transformer": first.transformer, "vae": first.vae, "text_encoder": first.text_encoder}
    files = {"tokenizer": first.tokenizer_folder, "scheduler": first.scheduler}
    checkpoints.save(tmp_path / "own", config=first.config, **parts, **files)
    second = checkpoints.load(tmp_path / "own")
    again = {"transformer": second.transformer, "vae": second.vae}
    assert same({**again, "text_encoder": second.text_encoder}, parts)
    assert (second.config, second.scheduler) == (first.config, first.scheduler)
    assert second.tokenizer.words() == first.tokenizer.words()
    shapes = module.shapes(WanTransformer, second.wan_config)
    assert jax.tree.structure(shapes) == jax.tree.structure(second.transformer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_chosen_on_save(tmp_path, transformer, dtype):
    config = checkpoints.make_config(WAN)
    checkpoints.save(tmp_path / "a", config=config, transformer=transformer, dtype=dtype)
    stored = checkpoints.load(tmp_path / "a", ("transformer",), dtype=None).transformer
    read = checkpoints.load(tmp_path / "a", ("transformer",)).transformer
    expected = transformer["proj_out"]["kernel"].astype(dtype)
    np.testing.assert_array_equal(stored["proj_out"]["kernel"], expected)
    assert read["proj_out"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(read["proj_out"]["kernel"], expected.astype(np.float32))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["parts"]["transformer"]["dtypes"] == [dtype]


def test_value_beyond_float16_is_refused(tmp_path, transformer):
    large = {**transformer, "scale_shift_table": transformer["scale_shift_table"] * 1e6}
    with pytest.raises(UserError, match="scale_shift_table has values beyond float16"):
        checkpoints.save(
            tmp_path / "a", config=checkpoints.make_config(WAN), transformer=large, dtype="float16"
        )
    assert not list(tmp_path.iterdir())


def test_save_refuses_parameters_that_do_not_fit(tmp_path, transformer):
    config = checkpoints.make_config(WAN)
    for broken in ({"proj_out": transformer["proj_out"]}, {**transformer, "more": np.ones(2)}):
        with pytest.raises(ValueError, match=r"does not fit the config: (missing|unknown)"):
            checkpoints.save(tmp_path / "a", config=config, transformer=broken)
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_the_old_folder(student, transformer, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(student, config=checkpoints.make_config(WAN), transformer=transformer)
    assert [path.name for path in student.parent.iterdir()] == ["student"]
    assert checkpoints.load(student, ("transformer",)).linear_layers == (0, 2)


KILLED = """
import os, pathlib, signal, sys
from linvideo_jax import folders

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "between the renames":
    rename, calls = pathlib.Path.rename, []
    pathlib.Path.rename = lambda a, b: die() if calls else (calls.append(a), rename(a, b))
with folders.replaced(pathlib.Path(sys.argv[1]), marker="manifest.json") as new:
    (new / "config.json").write_text("{")
    if sys.argv[2] == "while writing":
        die()
"""


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_killed_save_leaves_the_old_folder(student, transformer, moment):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(student), moment], check=False)
    assert killed.returncode == -9
    assert len(list(student.parent.iterdir())) == 2, "something is left behind"
    assert checkpoints.load(student, ("transformer",)).linear_layers == (0, 2)
    checkpoints.save(student, config=checkpoints.make_config(WAN), transformer=transformer)
    assert [path.name for path in student.parent.iterdir()] == ["student"]
    assert checkpoints.load(student, ("transformer",)).linear_layers == ()


def test_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(UserError, match="holds other files; choose a new or empty folder"),
        folders.replaced(tmp_path, marker="manifest.json"),
    ):
        raise AssertionError
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def _nothing(folder):
    """It never had a VAE."""


def _no_config(folder):
    (folder / "config.json").unlink()


def _set(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _truncate(folder):
    for file in (folder / "transformer").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])


def _no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "parts", "sentence"),
    [
        (_no_manifest, ("transformer",), "is no checkpoint: give a folder that this program wrote"),
        (_no_config, ("transformer",), "config.json is missing: the checkpoint is not complete"),
        (_nothing, ("vae",), "has no vae: convert or save it with that part"),
        (_truncate, ("transformer",), "transformer is damaged or not complete"),
        (_set(linear_layers=[0, 3]), ("transformer",), "linear_layers must be from 0 to 2"),
        (_set(linear_layers=[2, 0]), ("transformer",), "must be sorted, each layer once"),
        (
            _set(feature_map="fourier"),
            ("transformer",),
            "it must be null or one of hedgehog, relu, taylor",
        ),
        (_set(linear_layers=[1]), ("transformer",), r"missing: blocks.1.attn1.feature_map.k, "),
    ],
)
def test_damaged_folder_is_one_sentence(student, damage, parts, sentence):
    damage(student)
    with pytest.raises(UserError, match=sentence):
        checkpoints.load(student, parts)


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist: give a folder"):
        checkpoints.load(tmp_path / "nothing")
