"""Both converters: every key accounted for, exact round trips, and wrong input in one message."""

import copy
import json
import logging
import shutil
import sys
import warnings
from contextlib import contextmanager

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


@contextmanager
def no_warning():
    """Fails if anything is warned of, by the warnings module or by the libraries' loggers."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.fixture(scope="module")
def ours(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline, converted."""
    out = tmp_path_factory.mktemp("convert") / "ours"
    assert run(from_torch, source=tiny_pipeline.folder, out=out) == 0
    return out


@pytest.fixture
def source(tiny_pipeline, tmp_path):
    """A copy of the tiny pipeline's folder, to be damaged."""
    return shutil.copytree(tiny_pipeline.folder, tmp_path / "source")


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


def test_wan_pipeline_loads_the_export_without_a_warning(tiny_pipeline, ours, tmp_path):
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


def test_a_checkpoint_without_scheduler_exports_diffusers_flow_settings(ours, tmp_path):
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


def test_student_goes_out_alone_and_comes_back(tiny_pipeline, student, tmp_path):
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


def test_student_in_diffusers_layout_keeps_its_feature_maps(student, tmp_path):
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


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path, change):
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def many_wrong_keys(source):
    def transformer(arrays):
        for layer in (0, 1):
            arrays[f"blocks.{layer}.attn2.gate.weight"] = np.zeros((2, 2), np.float32)
            del arrays[f"blocks.{layer}.attn1.to_q.bias"]
        arrays["proj_out.bias"] = np.zeros(5, np.float32)

    def vae(arrays):
        del arrays["quant_conv.bias"]
        arrays["post_quant_conv.bias"] = np.zeros(4, np.int32)

    edit_tensors(source / "transformer" / "diffusion_pytorch_model.safetensors", transformer)
    edit_tensors(source / "vae" / "diffusion_pytorch_model.safetensors", vae)


def shorten(source):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_magic(source):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def absent_weights(source):
    (source / "text_encoder" / "model.safetensors").unlink()


def index_of(weight_map):
    def change(source):
        path = source / "text_encoder" / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))

    return change


def key_in_two_shards(source):
    folder = source / "text_encoder"
    save_file({"shared.weight": np.zeros(1, np.float32)}, folder / "b.safetensors")
    index_of({"a": "model.safetensors", "shared.weight": "b.safetensors"})(source)


def no_index(source):
    (source / "model_index.json").unlink()


def nothing_known(source):
    shutil.rmtree(source)
    source.mkdir()
    (source / "README.md").write_text("")


def broken_json(source):
    (source / "vae" / "config.json").write_text("{")


def base_elsewhere(source):
    no_index(source)
    edit_json(source / "config.json", base="../nowhere")


def changes(file, **values):
    return lambda source: edit_json(source / file, **values)


WRONG = {
    "keys": (
        many_wrong_keys,
        [
            "does not fit its configuration; nothing was written",
            "unknown: blocks.{0-1}.attn2.gate.weight",
            "missing: blocks.{0-1}.attn1.to_q.bias",
            "wrong shape [5] instead of [16]: proj_out.bias",
            "missing: quant_conv.bias",
            "dtype I32, not one of F32, F16, BF16, F8_E4M3: post_quant_conv.bias",
        ],
    ),
    "truncated": (shorten, ["diffusion_pytorch_model.safetensors is truncated or no safetensors"]),
    "wrong magic": (wrong_magic, ["is truncated or no safetensors file"]),
    "absent weights": (absent_weights, ["model.safetensors is missing (and so is its index"]),
    "absent shard": (index_of({"a": "b.safetensors"}), ["names files that are missing: b.safe"]),
    "no weight_map": (index_of(None), ["has no weight_map of keys to files"]),
    "key in two shards": (key_in_two_shards, ["given twice: shared.weight"]),
    "nothing known": (nothing_known, ["has neither model_index.json nor a `base`"]),
    "broken json": (broken_json, ["vae/config.json cannot be read as JSON"]),
    "image to video": (
        changes("model_index.json", _class_name="WanImageToVideoPipeline"),
        ["model_index.json is an image-to-video model (I2V): only Wan2.1's text-to-video"],
    ),
    "two transformers": (
        changes("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        ["model_index.json is Wan2.2's A14B, two transformers in turn: only"],
    ),
    "other class": (
        changes("vae/config.json", _class_name="AutoencoderKL"),
        ["vae/config.json is of AutoencoderKL, not of AutoencoderKLWan"],
    ),
    "config against tensors": (
        changes("transformer/config.json", num_layers=3),
        ["missing: blocks.2.attn1.norm_k.weight"],
    ),
    "unknown field": (changes("transformer/config.json", gates=2), ["Unknown keys in the transf"]),
    "layer that is not there": (
        changes("config.json", linear_layers=[2], feature_map="hedgehog"),
        ["linear_layers must be from 0 to 1"],
    ),
    "no feature map": (changes("config.json", linear_layers=[0]), ["need a feature_map"]),
    "no linvideo.safetensors": (
        changes("config.json", linear_layers=[0], feature_map="hedgehog"),
        ["linvideo.safetensors is missing"],
    ),
    "base elsewhere": (base_elsewhere, ["'../nowhere' as base", "not a folder in diffusers'"]),
}


@pytest.mark.parametrize(("damage", "sentences"), WRONG.values(), ids=WRONG)
def test_wrong_source(source, capsys, damage, sentences):
    """Exit code 2, one message, nothing written."""
    damage(source)
    assert run(from_torch, source=source, out=source.parent / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error: ") == 1
    for sentence in sentences:
        assert sentence in error
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_wrong_flags(tiny_pipeline, ours, tmp_path, capsys):
    good, out = tiny_pipeline.folder, tmp_path / "out"
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    back = {"checkpoint": ours, "out": out}
    cases = [
        (from_torch, {"out": out}, "--source is missing"),
        (from_torch, {"source": tmp_path / "no", "out": out}, "is not there: name a folder, a file"),
        (from_torch, {"source": good, "out": out, "dtype": "int8"}, "--dtype=int8 is unknown"),
        (from_torch, {"source": good, "out": out, "parts": "vae,clip"}, "--parts=clip is unknown"),
        (from_torch, {"source": good, "out": out, "speed": "high"}, "Unknown command line flag"),
        (from_torch, {"source": good, "out": tmp_path / "file"}, "is a file; choose another"),
        (from_torch, {"source": good, "out": tmp_path / "file/out"}, "cannot be written: Not a d"),
        (from_torch, {"source": good, "out": full}, "holds other files; choose a new or empty"),
        (to_torch, {**back, "checkpoint": tmp_path}, "is no checkpoint: give a folder"),
        (to_torch, {**back, "out": full}, "holds other files; choose a new or empty"),
        (to_torch, {**back, "layout": "onnx"}, "--layout=onnx is unknown; choose from diffusers"),
        (to_torch, {**back, "layout": "linvideo"}, "--base is missing"),
        (to_torch, {**back, "base": good}, "--base goes with --layout=linvideo only"),
        (to_torch, {**back, "layout": "linvideo", "base": tmp_path}, "cannot be the base"),
    ]
    for program, flags, sentence in cases:
        assert run(program, **flags) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


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
