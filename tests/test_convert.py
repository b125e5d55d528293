"""Both converters: every key accounted for, exact round trips, and wrong input in one message."""

import copy
import json
import shutil
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import from_torch, to_torch
from convert.importer import grouped
from convert.keys import torch_entries
from linvideo_jax import checkpoints
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig
from linvideo_jax.parts import flat_shapes

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def run(program, **flags) -> int:
    return program.main(["program", *(f"--{name}={value}" for name, value in flags.items())])


def tensors(folder, stem):
    """Every tensor of a folder's safetensors files, sharded or not."""
    files = [load_file(path) for path in folder.glob(f"{stem}*.safetensors")]
    return {key: array for file in files for key, array in file.items()}


def assert_bit_exact(folder, other):
    for part, stem in WEIGHTS.items():
        a, b = tensors(folder / part, stem), tensors(other / part, stem)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
            assert a[key].tobytes() == b[key].tobytes(), key


@pytest.fixture(scope="module")
def student(tiny_pipeline, tmp_path_factory):
    """A checkpoint of ours, bfloat16, whose layer 1 is linear with random feature maps."""
    checkpoint = checkpoints.load(tiny_pipeline.folder)
    random, params = np.random.default_rng(0), copy.deepcopy(checkpoint.transformer)
    params["blocks"]["attn1"]["feature_map"] = {
        name: random.normal(size=(2, 2, 16, 8)).astype(np.float32) for name in "qk"
    }
    folder = tmp_path_factory.mktemp("convert") / "student"
    checkpoints.save(
        folder,
        config={**checkpoint.config, "linear_layers": [1], "feature_map": "hedgehog"},
        transformer=params,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer_folder,
        scheduler=checkpoint.scheduler,
        dtype="bfloat16",
    )
    return folder


def test_tables_name_every_key_and_shape(tiny_pipeline):
    theirs = tiny_pipeline.theirs
    configs = {
        "transformer": WanConfig.from_dict(theirs.transformer.config),
        "vae": VAEConfig.from_dict(theirs.vae.config),
        "text_encoder": UMT5Config.from_dict(theirs.text_encoder.config.to_dict()),
    }
    for part, config in configs.items():
        state = getattr(theirs, part).state_dict()
        state.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        entries = torch_entries(part, flat_shapes(part, config))
        assert {key: entry.shape for key, entry in entries.items()} == {
            key: tuple(value.shape) for key, value in state.items()
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [False, True])
def test_round_trip_is_bit_exact(tiny_pipeline, tmp_path, dtype, shards):
    theirs = copy.deepcopy(tiny_pipeline.theirs)
    theirs.to(getattr(torch, dtype))
    size = {"max_shard_size": "20KB"} if shards else {}
    theirs.save_pretrained(tmp_path / "source", **size)
    indices = list((tmp_path / "source").rglob("*.index.json"))
    assert len(indices) == (3 if shards else 0)
    assert run(from_torch, source=tmp_path / "source", out=tmp_path / "ours") == 0
    assert run(to_torch, checkpoint=tmp_path / "ours", out=tmp_path / "back") == 0
    assert_bit_exact(tmp_path / "source", tmp_path / "back")


def test_dtype_of_import_and_export(tiny_pipeline, tmp_path):
    flags = {"dtype": "bfloat16", "parts": "vae,transformer"}
    assert run(from_torch, source=tiny_pipeline.folder, out=tmp_path / "ours", **flags) == 0
    assert not (tmp_path / "ours" / "text_encoder").exists()
    stored = checkpoints.load(tmp_path / "ours", ("vae",), dtype=None)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored.vae)} == {"bfloat16"}
    assert run(from_torch, source=tiny_pipeline.folder, out=tmp_path / "ours") == 0, "replaced"
    assert run(to_torch, checkpoint=tmp_path / "ours", out=tmp_path / "b", dtype="bfloat16") == 0
    exported = tensors(tmp_path / "b" / "vae", WEIGHTS["vae"])
    assert {str(array.dtype) for array in exported.values()} == {"bfloat16"}


def test_wan_pipeline_loads_the_export_without_a_warning(tiny_pipeline, ours, tmp_path, no_warning):
    assert run(to_torch, checkpoint=ours, out=tmp_path / "back", layout="diffusers") == 0
    with no_warning():
        loaded = diffusers.WanPipeline.from_pretrained(tmp_path / "back")
    for part in WEIGHTS:
        mine, theirs = getattr(loaded, part), getattr(tiny_pipeline.theirs, part)
        expected = theirs.state_dict()
        for key, value in mine.state_dict().items():
            assert torch.equal(value, expected.pop(key)), key
        assert not expected
    for part in ("transformer", "vae", "scheduler"):
        mine, theirs = (
            {key: list(v) if isinstance(v, tuple) else v for key, v in p.items() if key[0] != "_"}
            for p in (getattr(loaded, part).config, getattr(tiny_pipeline.theirs, part).config)
        )
        assert mine == theirs
    mine, theirs = (p.text_encoder.config.to_dict() for p in (loaded, tiny_pipeline.theirs))
    ignored = {"_name_or_path", "transformers_version", "num_decoder_layers"}  # an encoder alone
    assert {k for k in theirs if mine.get(k) != theirs[k]} <= ignored
    words = "a red 3 moves right"
    assert loaded.tokenizer(words).input_ids == tiny_pipeline.theirs.tokenizer(words).input_ids


def test_a_checkpoint_without_scheduler_exports_diffusers_flow_settings(ours, tmp_path, no_warning):
    checkpoint = checkpoints.load(ours)
    checkpoints.save(
        tmp_path / "own",
        config={**checkpoint.config, "flow_shift": 7.0},
        transformer=checkpoint.transformer,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer_folder,
    )
    assert run(to_torch, checkpoint=tmp_path / "own", out=tmp_path / "back") == 0
    with no_warning():
        scheduler = diffusers.WanPipeline.from_pretrained(tmp_path / "back").scheduler
    assert isinstance(scheduler, diffusers.UniPCMultistepScheduler)
    assert scheduler.config.use_flow_sigmas and scheduler.config.flow_shift == 7.0
    assert scheduler.config.prediction_type == "flow_prediction"


def test_shared_embedding_under_either_name(source, tmp_path, capsys):
    path = source / "text_encoder" / "model.safetensors"
    arrays = load_file(path)
    expected = arrays["shared.weight"]
    for keys in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        rest = {key: array for key, array in arrays.items() if key != "shared.weight"}
        save_file({**rest, **dict.fromkeys(keys, expected)}, path)
        loaded = checkpoints.load(source, ("text_encoder",)).text_encoder
        np.testing.assert_array_equal(loaded["shared"]["embedding"], expected)
    save_file({**arrays, "encoder.embed_tokens.weight": expected + 1}, path)
    assert run(from_torch, source=source, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "must be one array: encoder.embed_tokens.weight and shared.weight" in error


def test_student_goes_out_alone_and_comes_back(tiny_pipeline, student, tmp_path, no_warning):
    base = shutil.copytree(tiny_pipeline.folder, tmp_path / "base")
    out = tmp_path / "alone"
    assert run(to_torch, checkpoint=student, out=out, layout="linvideo", base=base) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "linvideo.safetensors",
        "linvideo_processor.py",
        "transformer",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["base"] == "../base" and config["linear_layers"] == [1]
    with safe_open(out / "linvideo.safetensors", framework="numpy") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes == {f"blocks.1.attn1.feature_map.{name}": [2, 16, 8] for name in "qk"}
    with no_warning():
        diffusers.WanTransformer3DModel.from_pretrained(out / "transformer")

    assert run(from_torch, source=out, out=tmp_path / "again") == 0
    for folder in (out, tmp_path / "again"):
        assert checkpoints.load(folder).linear_layers == (1,)
        mine, theirs = (
            checkpoints.load(f, ("transformer",), dtype=None).transformer for f in (folder, student)
        )
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), mine, theirs)
        assert jax.tree.all(same)


def test_student_in_diffusers_layout_keeps_its_feature_maps(student, tmp_path, no_warning):
    assert run(to_torch, checkpoint=student, out=tmp_path / "out") == 0
    with no_warning():
        diffusers.WanPipeline.from_pretrained(tmp_path / "out")
    mine, theirs = (checkpoints.load(f, ("transformer",)) for f in (tmp_path / "out", student))
    assert mine.config["linear_layers"] == theirs.config["linear_layers"] == [1]
    assert jax.tree.all(jax.tree.map(np.array_equal, mine.transformer, theirs.transformer))


@pytest.mark.parametrize("program", ["from_torch", "to_torch"])
def test_run_by_path_without_installation(program, pytestconfig, monkeypatch, capsys):
    """As `python convert/X.py` runs it: only the script's own folder is on the path."""
    import runpy

    folder = pytestconfig.rootpath / "convert"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path[1:]])
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(folder / f"{program}.py"), run_name="__main__")
    assert exit.value.code == 0 and sys.path[0] == str(pytestconfig.rootpath)
    assert "--out: folder to write" in capsys.readouterr().out


def test_keys_are_grouped():
    keys = ["a.0.w", "a.2.w", "a.1.w", "a.5.w", "b", "c.3.w", "a.0.v"]
    assert grouped(keys) == "a.0.v, a.{0-2,5}.w, b, c.3.w"


def test_stray_argument(capsys):
    assert from_torch.main(["program", "assets"]) == 2
    assert "'assets' is not a flag" in capsys.readouterr().err


def test_interrupted(tiny_pipeline, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "copytree", interrupt)
    assert run(from_torch, source=tiny_pipeline.folder, out=tmp_path / "out") == 130
    assert "nothing was written; give the same command again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
