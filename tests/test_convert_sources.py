"""What from_torch recognises: original layout, part folders, single files, Hugging Face names."""

import json
import shutil
import subprocess
import sys

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.numpy import load_file, save_file

from convert import from_torch, hub, original, sizes, to_torch
from convert.keys import torch_entries
from linvideo_jax import checkpoints
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig
from linvideo_jax.parts import flat_shapes

STEM = "diffusion_pytorch_model"
BFLOAT16, FLOAT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def run(program, *words, **flags) -> int:
    given = (f"--{name}={value}" for name, value in flags.items())
    return program.main(["program", *words, *given])


def stored(folder, part):
    """A checkpoint's parameters as they are on disk, by flat name."""
    flat = checkpoints.read_flat(folder, (part,))[1][part]
    return {name: np.asarray(array) for name, array in flat.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def ours(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline, but with a VAE of 16 channels, in bfloat16; a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("sources")
    base = shutil.copytree(tiny_pipeline.folder, folder / "base")
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
    vae.save_pretrained(base / "vae")
    assert run(from_torch, source=base, out=folder / "ours", dtype="bfloat16") == 0
    return folder / "ours"


@pytest.fixture(scope="module")
def exported(ours):
    """The same in the original repository's layout."""
    assert run(to_torch, checkpoint=ours, out=ours.parent / "original", layout="original") == 0
    return ours.parent / "original"


@pytest.fixture
def transformer(exported, tmp_path):
    """Tensors of the transformer under the original names, and its config.json in tmp_path."""
    shutil.copy(exported / "config.json", tmp_path)
    return load_file(exported / f"{STEM}.safetensors")


def test_original_names_are_those_that_diffusers_converts():
    """The keys and shapes of diffusers' models, named as the original, through its converter."""
    wan = WanConfig(num_layers=2, num_attention_heads=1, attention_head_dim=12, ffn_dim=8)
    for part, config, convert in (
        ("transformer", wan, convert_wan_transformer_to_diffusers),
        ("vae", VAEConfig(base_dim=4), convert_wan_vae_to_diffusers),
    ):
        entries = torch_entries(part, flat_shapes(part, config))
        shapes = {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()}
        names = original.rename(original.names(part), shapes, to_original=True)
        assert names.keys() == shapes.keys()
        back = original.rename(original.names(part), names.values(), to_original=False)
        assert back == {name: key for key, name in names.items()}
        theirs = convert({names[key]: value for key, value in shapes.items()})
        assert {key: value.shape for key, value in theirs.items()} == {
            key: value.shape for key, value in shapes.items()
        }


def test_original_names_of_the_text_encoder():
    keys = """token_embedding.weight norm.weight blocks.0.norm1.weight blocks.0.norm2.weight
        blocks.0.attn.q.weight blocks.0.attn.k.weight blocks.0.attn.v.weight blocks.0.attn.o.weight
        blocks.0.ffn.gate.0.weight blocks.0.ffn.fc1.weight blocks.0.ffn.fc2.weight
        blocks.0.pos_embedding.embedding.weight"""
    entries = torch_entries("text_encoder", flat_shapes("text_encoder", UMT5Config(num_layers=1)))
    names = original.rename(original.names("text_encoder"), entries, to_original=True)
    assert sorted(names.values()) == sorted(keys.split()) and names.keys() == entries.keys()


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("transformer", WanConfig()),
        ("transformer", WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)),
        ("vae", VAEConfig()),
        ("text_encoder", UMT5Config()),
    ],
)
def test_sizes_are_derived_from_shapes(part, config):
    """Of the published models, without their config.json."""
    entries = torch_entries(part, flat_shapes(part, config))
    shapes = {key: entry.shape for key, entry in entries.items()}
    assert sizes.derive(part, shapes, "file") == config


def test_original_layout_round_trip(ours, exported, tmp_path, capsys):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "Wan2.1_VAE.pth",
        "config.json",
        f"{STEM}.safetensors",
        "google",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]
    assert json.loads((exported / "config.json").read_text())["num_heads"] == 2
    t5 = torch.load(exported / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    assert t5["token_embedding.weight"].dtype == torch.bfloat16
    assert run(from_torch, source=exported, out=tmp_path / "back") == 0
    assert "is a folder in the original repository's layout" in capsys.readouterr().out
    for part in ("transformer", "vae", "text_encoder"):
        assert_equal(stored(tmp_path / "back", part), stored(ours, part))
    mine, theirs = (checkpoints.load(folder) for folder in (tmp_path / "back", ours))
    assert mine.tokenizer.words() == theirs.tokenizer.words()
    assert mine.wan_config == theirs.wan_config and mine.vae_config == theirs.vae_config
    assert (mine.sampling["flow_shift"], mine.sampling["time_grid"]) == (5.0, "original")
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert manifest["source"] == str(exported) and "original" in manifest["kind"]
    assert manifest["source_dtypes"]["vae"] == ["bfloat16"]
    assert manifest["sizes"]["transformer"]["num_layers"] == 2


@pytest.mark.parametrize("indexed", [True, False])
def test_original_layout_in_shards(ours, transformer, tmp_path, indexed):
    keys, files = sorted(transformer), [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for start, file in enumerate(files):
        save_file({key: transformer[key] for key in keys[start::2]}, tmp_path / file)
    if indexed:
        index = {key: files[i % 2] for i, key in enumerate(keys)}
        path = tmp_path / f"{STEM}.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": index}))
    assert run(from_torch, source=tmp_path, out=tmp_path / "out") == 0
    assert_equal(stored(tmp_path / "out", "transformer"), stored(ours, "transformer"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_single_file(ours, transformer, tmp_path, capsys, prefix, suffix):
    path, tensors = tmp_path / f"wan.{suffix}", {prefix + k: v for k, v in transformer.items()}
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        words = {k: torch.from_numpy(v.view(np.int16)) for k, v in tensors.items()}
        torch.save({k: word.view(torch.bfloat16) for k, word in words.items()}, path)
    assert run(from_torch, source=path, out=tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "a single file: transformer under original names" in out
    assert "without vae, text_encoder, tokenizer" in out and (prefix in out)
    assert_equal(stored(tmp_path / "out", "transformer"), stored(ours, "transformer"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_single_file_keeps_its_dtype(transformer, tmp_path, dtype):
    dtype = np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16
    save_file({k: v.astype(dtype) for k, v in transformer.items()}, tmp_path / "a.safetensors")
    assert run(from_torch, source=tmp_path / "a.safetensors", out=tmp_path / "out") == 0
    assert {array.dtype for array in stored(tmp_path / "out", "transformer").values()} == {dtype}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_float8(transformer, tmp_path, capsys, scaled, suffix):
    """Matrices in float8, with a scale each or without; the rest as it was."""
    tensors, expected = {}, {}
    for key, array in transformer.items():
        tensors[key] = expected[key] = array
        if array.ndim == 2 and key.startswith("blocks"):
            scale = np.float32(np.abs(array.astype(np.float32)).max() / 400) if scaled else 1
            tensors[key] = (array.astype(np.float32) / scale).astype(FLOAT8)
            expected[key] = (tensors[key].astype(np.float32) * scale).astype(BFLOAT16)
            if scaled:
                tensors[f"{key[:-6]}scale_weight"] = np.full(1, scale, np.float32)
                tensors[f"{key[:-6]}scale_input"] = np.ones(1, np.float32)
    if scaled:
        tensors["scaled_fp8"] = np.zeros(2, FLOAT8)
    path = tmp_path / f"wan.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        same = {1: (np.uint8, torch.float8_e4m3fn), 2: (np.int16, torch.bfloat16)}
        torch.save(
            {
                k: torch.from_numpy(v.view(same[v.itemsize][0])).view(same[v.itemsize][1])
                if v.itemsize in same
                else torch.from_numpy(v)
                for k, v in tensors.items()
            },
            path,
        )
    assert run(from_torch, source=path, out=tmp_path / "out") == 0
    words = capsys.readouterr().out
    assert ", scaled float8" in words if scaled else ", float8." in words
    save_file(expected, tmp_path / "expected.safetensors")
    assert run(from_torch, source=tmp_path / "expected.safetensors", out=tmp_path / "same") == 0
    assert_equal(*(stored(tmp_path / name, "transformer") for name in ("out", "same")))


def test_lone_folders_of_diffusers(tiny_pipeline, tmp_path, capsys):
    whole = checkpoints.load(tiny_pipeline.folder)
    for part in ("transformer", "vae", "text_encoder"):
        out = tmp_path / part
        assert run(from_torch, source=tiny_pipeline.folder / part, out=out) == 0
        assert f"is the {part} folder of diffusers' layout" in capsys.readouterr().out
        mine, theirs = (getattr(c, part) for c in (checkpoints.load(out, (part,)), whole))
        assert jax.tree.all(jax.tree.map(np.array_equal, mine, theirs))
    shutil.copytree(tiny_pipeline.folder / "vae", tmp_path / "some" / "vae")
    assert run(from_torch, source=tmp_path / "some", out=tmp_path / "out") == 0
    assert "part of a folder in diffusers' layout (vae)" in capsys.readouterr().out


def test_sources_are_put_together(exported, ours, transformer, tmp_path):
    save_file(transformer, tmp_path / "wan.safetensors")
    files = (exported / "Wan2.1_VAE.pth", exported / "models_t5_umt5-xxl-enc-bf16.pth")
    source = ",".join(map(str, (tmp_path / "wan.safetensors", *files)))
    assert run(from_torch, source=source, out=tmp_path / "out") == 0
    for part in ("transformer", "vae", "text_encoder"):
        assert_equal(stored(tmp_path / "out", part), stored(ours, part))


def test_hugging_face_name(tiny_pipeline, tmp_path, monkeypatch):
    asked = {}

    def snapshot(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(tiny_pipeline.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert run(from_torch, source="Wan-AI/Wan2.1", out=tmp_path / "out", parts="vae") == 0
    (patterns,) = asked.values()
    assert "vae/*" in patterns and "transformer/*" not in patterns
    assert (tmp_path / "out" / "manifest.json").exists()
    assert not hub.is_name(str(tmp_path)) and not hub.is_name("a") and hub.is_name("a/b/c.pth")


LARGE = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from convert import from_torch

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        peak.append(anonymous())
        time.sleep(0.02)

before, peak = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
code = from_torch.main(["from_torch", f"--source={sys.argv[1]}", f"--out={sys.argv[2]}"])
print(json.dumps({"code": code, "peak": max(peak) - before}))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """0.9 GB of random bits take less than half of that."""
    config = UMT5Config(vocab_size=60_000, d_model=2048, num_layers=5, num_heads=16, d_ff=8192)
    entries = torch_entries("text_encoder", flat_shapes("text_encoder", config))
    header, end = {}, 0
    for key, entry in entries.items():
        start, end = end, end + 2 * int(np.prod(entry.shape))
        header[key] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).bytes(1 << 24)
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    assert end > 0.7e9
    words = [sys.executable, "-c", LARGE, tmp_path / "large.safetensors", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr
    assert result["peak"] < 0.45e9, result
    assert "100%" in done.stderr and "MB/s" in done.stderr
