"""Wrong input to the converters: one sentence, exit code 2, nothing written."""

import json
import pickle
import resource
import shutil
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from convert import from_torch, to_torch

STEM = "diffusion_pytorch_model"


def run(program, *words, **flags) -> int:
    given = (f"--{name}={value}" for name, value in flags.items())
    return program.main(["program", *words, *given])


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


def alone(name, keep=(), **shapes):
    """A file of zeros beside the folder's other ones, and the config.json of the original."""

    def change(source):
        shutil.rmtree(source)
        source.mkdir()
        tensors = {
            key.replace("__", "."): np.zeros(shape, np.float32) for key, shape in shapes.items()
        }
        save_file({**tensors, **dict(keep)}, source / name)
        return source / name

    return change


def original_of(**config):
    """The transformer as the original's folder has it, with a config.json that says `config`."""

    def change(source):
        assert run(from_torch, source=source, out=source / "o") == 0
        assert run(to_torch, checkpoint=source / "o", out=source / "w", layout="original") == 0
        edit_json(source / "w" / "config.json", **config)
        return source / "w"

    return change


def without_config(source):
    folder = original_of()(source)
    (folder / "config.json").unlink()
    return folder / f"{STEM}.safetensors"


def one_of_three_shards(source):
    folder = original_of()(source)
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}-00001-of-00003.safetensors")
    return folder


def of_another_form(**changes):
    """The transformer as a single file in which the keys of `changes` are other arrays, or none."""

    def change(source):
        folder = original_of()(source)
        tensors = load_file(folder / f"{STEM}.safetensors")
        for name, array in changes.items():
            tensors[name.replace("__", ".")] = array
        tensors = {key: array for key, array in tensors.items() if array is not None}
        save_file(tensors, folder / "wan.safetensors")
        return folder / "wan.safetensors"

    return change


class Code:
    """What a pickle may hold: to load it is to call something."""

    def __reduce__(self):
        return pytest.fail, ("code of a pickle was run",)


def pickled(content, **options):
    def change(source):
        torch.save(content, source / "wan.pth", **options)
        return source / "wan.pth"

    return change


def bytes_of(content, name="wan.pth"):
    def change(source):
        (source / name).write_bytes(content)
        return source / name

    return change


def config_of(content):
    def change(source):
        (source / "vae" / "config.json").write_bytes(content)

    return change


def half_a_pickle(source):
    torch.save({"a": torch.zeros(10_000)}, source / "wan.pth")
    content = (source / "wan.pth").read_bytes()
    (source / "wan.pth").write_bytes(content[: len(content) // 2])
    return source / "wan.pth"


def vae_alone(source):
    shutil.move(source / "vae" / f"{STEM}.safetensors", source / "vae.safetensors")
    (source / "config.json").unlink()
    return source / "vae.safetensors"


FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
NARROW = {"blocks__0__self_attn__q__weight": np.zeros((32, 32), FLOAT8)}

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
    "config against tensors, original": (
        original_of(ffn_dim=50, num_layers=3),
        ["contradicts the tensors", "ffn_dim is 50 there but 48 here, num_layers is 3 there but 2"],
    ),
    "no config and an odd width": (without_config, ["is 32 wide, which are no heads of 128"]),
    "one of three shards": (one_of_three_shards, ["has 1 of the 3 files", "fetch the others"]),
    "value of the wrong kind": (
        changes("transformer/config.json", num_layers="two"),
        ["transformer's configuration has values of the wrong kind"],
    ),
    "config of bytes": (config_of(b"\xff{"), ["vae/config.json cannot be read as JSON"]),
    "config of a list": (config_of(b"[]"), ["vae/config.json does not hold a JSON object"]),
    "I2V by its config": (
        changes("transformer/config.json", image_dim=1280),
        ["is an image-to-video model (I2V): only Wan2.1's text-to-video models are supported."],
    ),
    "FLF2V by its config": (
        changes("transformer/config.json", image_dim=1280, pos_embed_seq_len=514),
        ["is a first-and-last-frame model (FLF2V): only"],
    ),
    "VACE by its config": (
        changes("transformer/config.json", vace_layers=[0]),
        ["is a VACE model: only"],
    ),
    "A14B by its config": (
        changes("model_index.json", boundary_ratio=0.875),
        ["is Wan2.2's A14B, two transformers in turn: only"],
    ),
    "TI2V-5B by its config": (
        changes("model_index.json", expand_timesteps=True),
        ["is Wan2.2's TI2V-5B: only"],
    ),
    "TI2V-5B by its VAE": (changes("vae/config.json", z_dim=48), ["is Wan2.2's TI2V-5B: only"]),
    "I2V, original": (original_of(model_type="i2v"), ["is an image-to-video model (I2V): only"]),
    "FLF2V, original": (original_of(model_type="flf2v"), ["is a first-and-last-frame model"]),
    "VACE, original": (original_of(model_type="vace"), ["is a VACE model: only"]),
    "TI2V-5B, original": (original_of(model_type="ti2v"), ["is Wan2.2's TI2V-5B: only"]),
    "S2V, original": (original_of(model_type="s2v"), ["is of the kind 's2v': only"]),
    "I2V by its keys": (
        alone("a.safetensors", blocks__0__cross_attn__k_img__weight=(2, 2)),
        ["a.safetensors is an image-to-video model (I2V): only"],
    ),
    "FLF2V by its keys": (
        alone("a.safetensors", img_emb__emb_pos=(1, 2, 2), img_emb__proj__1__weight=(2, 2)),
        ["a.safetensors is a first-and-last-frame model (FLF2V): only"],
    ),
    "VACE by its keys": (
        alone("a.safetensors", vace_blocks__0__self_attn__q__weight=(2, 2)),
        ["a.safetensors is a VACE model: only"],
    ),
    "I2V-A14B by its channels": (
        of_another_form(patch_embedding__weight=np.zeros((32, 36, 1, 2, 2), np.float32)),
        ["is an image-to-video model (I2V) of Wan2.2's A14B: only"],
    ),
    "T2V-A14B by its name": (
        alone("wan2.2_t2v_high_noise_14B.safetensors", a=(1,)),
        ["is Wan2.2's A14B, two transformers in turn: only"],
    ),
    "TI2V-5B by its channels": (
        of_another_form(patch_embedding__weight=np.zeros((3072, 48, 1, 2, 2), np.float16)),
        ["is Wan2.2's TI2V-5B: only"],
    ),
    "Wan2.2's VAE by its keys": (
        alone("a.safetensors", decoder__upsamples__0__upsamples__0__residual__0__gamma=(1,)),
        ["is Wan2.2's TI2V-5B: only"],
    ),
    "another model": (
        alone("a.safetensors", unet__weight=(1,)),
        ["has keys of no part of Wan2.1 (unet.weight, ...)"],
    ),
    "VAE of unknown statistics": (vae_alone, ["4 channels of latents; the statistics"]),
    "no patch embedding": (
        of_another_form(patch_embedding__weight=None),
        ["lacks patch_embedding.weight, without which it is no transformer"],
    ),
    "with prefix and without": (
        of_another_form(
            **{"model__diffusion_model__head__head__bias": np.zeros(16, ml_dtypes.bfloat16)}
        ),
        ["unknown: model.diffusion_model.head.head.bias"],
    ),
    "float64": (
        of_another_form(head__head__bias=np.zeros(16)),
        ["dtype F64, not one of F32, F16, BF16, F8_E4M3: head.head.bias"],
    ),
    "scaled float8 without a scale": (
        of_another_form(**NARROW, scaled_fp8=np.zeros(2, FLOAT8)),
        ["scaled float8 file, but lacks the scale of blocks.0.self_attn.q.weight"],
    ),
    "scaled float8 with a vector": (
        of_another_form(**NARROW, blocks__0__self_attn__q__scale_weight=np.ones(32, np.float32)),
        ["has scales that are not one number: blocks.0.self_attn.q.scale_weight"],
    ),
    "pickle with code": (
        pickled({"a": Code()}),
        ["wan.pth holds more than weights and is not loaded, since loading could run its code"],
    ),
    "pickle with code, old": (
        bytes_of(pickle.dumps({"a": Code()})),
        ["wan.pth is truncated or no file of torch.save's present format"],
    ),
    "pickle of the old format": (
        pickled({"a": torch.zeros(1)}, _use_new_zipfile_serialization=False),
        ["wan.pth is truncated or no file of torch.save's present format"],
    ),
    "truncated pickle": (half_a_pickle, ["wan.pth is truncated or no file of torch.save's"]),
    "empty pickle": (bytes_of(b""), ["wan.pth is truncated or no file of torch.save's"]),
    "pickle of a list": (pickled([torch.zeros(1)]), ["wan.pth holds no tensors by name"]),
    "pickle of numbers": (pickled({"a": 1}), ["wan.pth holds no tensors by name"]),
    "another suffix": (bytes_of(b"GGUF", "wan.gguf"), ["neither .safetensors nor .pth"]),
    "base elsewhere": (base_elsewhere, ["'../nowhere' as base", "not a folder in diffusers'"]),
}


@pytest.mark.parametrize(("damage", "sentences"), WRONG.values(), ids=WRONG)
def test_wrong_source(source, capsys, damage, sentences):
    """A damaged folder, or a file in it that `damage` names: one message, nothing written."""
    given = damage(source) or source
    capsys.readouterr()
    assert run(from_torch, source=given, out=source.parent / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error: ") == 1
    assert "Traceback" not in error
    for sentence in sentences:
        assert sentence in error
    assert [path.name for path in source.parent.iterdir()] == ["source"]


DOWN, UP = "blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_B.weight"

LORAS = {
    "matches nothing": (
        {"blocks.0.attn3.to_q.lora_A.weight": (2, 2), "clip.alpha": ()},
        ["match nothing: blocks.0.attn3.to_q.lora_A.weight, clip.alpha"],
    ),
    "half a pair": ({DOWN: (2, 32)}, [f"blocks.0.attn1.to_q has only {DOWN}"]),
    "of another width": (
        {DOWN: (2, 48), UP: (32, 2)},
        [f"does not fit blocks.0.attn1.to_q.weight: {DOWN}"],
    ),
    "of another rank": (
        {DOWN: (3, 32), UP: (32, 2)},
        [f"does not fit blocks.0.attn1.to_q.weight: {UP}"],
    ),
    "difference of another shape": (
        {"blocks.0.norm2.diff_b": (5,)},
        ["does not fit blocks.0.norm2.bias: blocks.0.norm2.diff_b"],
    ),
    "empty": ({}, ["it holds nothing"]),
}


@pytest.mark.parametrize(("tensors", "sentences"), LORAS.values(), ids=LORAS)
def test_wrong_lora(tiny_pipeline, tmp_path, capsys, tensors, sentences):
    path = tmp_path / "lora.safetensors"
    save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, path)
    flags = {"source": tiny_pipeline.folder, "out": tmp_path / "out", "lora": path}
    assert run(from_torch, **flags) == 2
    error = capsys.readouterr().err
    assert "lora.safetensors cannot be merged; nothing was written." in error
    for sentence in sentences:
        assert sentence in error
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def offline(*_, **__):
    raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nmore")


def test_wrong_flags(tiny_pipeline, ours, tmp_path, capsys, monkeypatch):
    good, out = tiny_pipeline.folder, tmp_path / "out"
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    back = {"checkpoint": ours, "out": out}
    alone = good / "transformer"
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    cases = [
        (from_torch, {"out": out}, "--source is missing"),
        (
            from_torch,
            {"source": tmp_path / "no", "out": out},
            "is not there: name a folder, a file",
        ),
        (from_torch, {"source": good, "out": out, "dtype": "int8"}, "--dtype=int8 is unknown"),
        (from_torch, {"source": good, "out": out, "parts": "vae,clip"}, "--parts=clip is unknown"),
        (from_torch, {"source": good, "out": out, "speed": "high"}, "Unknown command line flag"),
        (from_torch, {"source": good, "out": tmp_path / "file"}, "is a file; choose another"),
        (from_torch, {"source": good, "out": tmp_path / "file/out"}, "cannot be written: Not a d"),
        (from_torch, {"source": good, "out": full}, "holds other files; choose a new or empty"),
        (from_torch, {"source": good, "out": "/proc/out"}, "/proc/out cannot be written"),
        (from_torch, {"source": "no-one/nothing", "out": out}, "could not be fetched from Hugging"),
        (from_torch, {"source": f"{good},{good}", "out": out}, "has a second text_encoder, tran"),
        (from_torch, {"source": alone, "out": out, "parts": "vae"}, "has no vae"),
        (from_torch, {"source": good, "out": out, "lora": "no:1"}, "there is no file no"),
        (from_torch, {"source": good, "out": out, "lora": "a:b"}, "after the colon belongs a num"),
        (from_torch, {"source": good, "out": out, "lora": "a:nan"}, "the strength must be finite"),
        (
            from_torch,
            {"source": good, "out": out, "lora": f"{tmp_path / 'file'}:1", "parts": "vae"},
            "--lora changes the transformer, which is not among the parts",
        ),
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


def test_full_disk(tiny_pipeline, ours, tmp_path, capsys, monkeypatch):
    """Told before anything is written; and if it fills up meanwhile, nothing is left."""
    flags = {"source": tiny_pipeline.folder, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000, total=1e9))
        assert run(from_torch, **flags) == 2
        assert "0.0 GB free: make room, or choose another folder." in capsys.readouterr().err
        assert run(to_torch, checkpoint=ours, out=tmp_path / "out") == 2
        assert "make room" in capsys.readouterr().err
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert run(from_torch, **flags) == 2
        first = capsys.readouterr().err
        assert run(to_torch, checkpoint=ours, out=tmp_path / "out") == 2
        second = capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for error in (first, second):
        assert "out cannot be written: File too large." in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_without_torch(ours, tmp_path, capsys, monkeypatch):
    (tmp_path / "vae.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(from_torch, source=tmp_path / "vae.pth", out=tmp_path / "out") == 2
    sentence = 'PyTorch\'s, which is not installed: pip install "linvideo_jax[torch]".'
    assert sentence in capsys.readouterr().err
    assert run(to_torch, checkpoint=ours, out=tmp_path / "out", layout="original") == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pth"]


def test_damaged_checkpoint_is_not_half_exported(ours, tmp_path, capsys):
    damaged = shutil.copytree(ours, tmp_path / "damaged")
    for file in (damaged / "vae").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        file.write_bytes(content)
    assert run(to_torch, checkpoint=damaged, out=tmp_path / "out") == 2
    assert "vae is damaged or not complete" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
