"""Four-step models that others published for Wan2.1: their keys, and what is none of ours.

The key lists are those of Self-Forcing's and CausVid's .pt files, of LightX2V's step-distilled
models and LoRAs (`lora_down`, `lora_up`, and differences `diff`, `diff_b`, `diff_m` of what has no
rank) and of FastVideo's FastWan, written as patterns for a model of any size.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import sample
from convert import from_torch, to_torch
from convert.original import TRANSFORMER, rename
from linvideo_jax import checkpoints

DIM, FFN, TEXT, FREQ, RANK = 32, 48, 24, 32, 3
RNG = np.random.default_rng(0)


def values(*shape):
    return RNG.normal(scale=0.1, size=shape).astype(np.float32)


def run(**flags) -> int:
    loras = [f"--lora={lora}" for lora in flags.pop("loras", ())]
    words = [*(f"--{name}={value}" for name, value in flags.items()), *loras]
    return from_torch.main(["from_torch.py", *words])


def kernels(folder):
    flat = checkpoints.read_flat(folder, ("transformer",))[1]["transformer"]
    return {name: np.asarray(array) for name, array in flat.items()}


@pytest.fixture(scope="module")
def original(ours, tmp_path_factory):
    """The tiny transformer's tensors under the original names, beside their config.json."""
    folder = tmp_path_factory.mktemp("few") / "original"
    words = [f"--checkpoint={ours}", f"--out={folder.parent / 'diffusers'}"]
    assert to_torch.main(["to_torch.py", *words]) == 0
    stored = load_file(folder.parent / "diffusers/transformer/diffusion_pytorch_model.safetensors")
    names = rename(TRANSFORMER, stored, to_original=True)
    folder.mkdir()
    sizes = {"_class_name": "WanModel", "dim": DIM, "num_heads": 2, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder, {names[key]: array for key, array in stored.items()}


def causvid(tensors):
    """bidirectional_checkpoint2/model.pt."""
    return {"generator": {f"model.{key}": value for key, value in tensors.items()}}


def self_forcing_plus(tensors):
    """checkpoint_model_003000/model.pt: FSDP's wraps in the keys, the average beside the raw."""

    def wrapped(key):
        key = key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
        return f"model._fsdp_wrapped_module.{key}"

    average = {wrapped(key): value for key, value in tensors.items()}
    raw = {key: value + 1 for key, value in average.items()}
    critic = {key: value - 1 for key, value in average.items()}
    return {"generator": raw, "critic": critic, "generator_ema": average, "step": 3000}


def compiled(tensors):
    return {f"model._orig_mod.{key}": value for key, value in tensors.items()}


@pytest.mark.parametrize("layout", [causvid, self_forcing_plus, compiled, dict])
def test_checkpoints_of_distillation_codes(original, ours, tmp_path, layout):
    folder, tensors = original
    content = layout({key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    torch.save(content, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert run(source=tmp_path / "model.pt", out=tmp_path / "out") == 0
    mine, theirs = kernels(tmp_path / "out"), kernels(ours)
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


def lightx2v_lora(layers=2, prefix="diffusion_model."):
    """Every key of a step-distillation LoRA for T2V, with shapes of the tiny model."""
    found = {}

    def module(name, outputs, inputs):
        found[f"{name}.lora_down.weight"] = values(RANK, inputs)
        found[f"{name}.lora_up.weight"] = values(outputs, RANK)
        found[f"{name}.diff_b"] = values(outputs)

    for i in range(layers):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                module(f"{block}.{attention}.{name}", DIM, DIM)
            for name in ("norm_q", "norm_k"):
                found[f"{block}.{attention}.{name}.diff"] = values(DIM)
        module(f"{block}.ffn.0", FFN, DIM)
        module(f"{block}.ffn.2", DIM, FFN)
        found[f"{block}.norm3.diff"], found[f"{block}.norm3.diff_b"] = values(DIM), values(DIM)
        found[f"{block}.diff_m"] = values(1, 6, DIM)
    module("text_embedding.0", DIM, TEXT)
    module("text_embedding.2", DIM, DIM)
    module("time_embedding.0", DIM, FREQ)
    module("time_embedding.2", DIM, DIM)
    module("time_projection.1", 6 * DIM, DIM)
    found["patch_embedding.diff"] = values(DIM, 4, 1, 2, 2)
    found["patch_embedding.diff_b"] = values(DIM)
    found["head.head.diff"], found["head.head.diff_b"] = values(16, DIM), values(16)
    found["head.diff_m"] = values(1, 2, DIM)
    return {prefix + key: array for key, array in found.items()}


def test_lora_of_a_step_distilled_model(tiny_pipeline, tmp_path):
    """Every tensor of the transformer moves as its key says; then four steps, by flags alone."""
    lora = lightx2v_lora()
    save_file(lora, tmp_path / "lora.safetensors")
    flags = {"source": tiny_pipeline.folder, "loras": [tmp_path / "lora.safetensors"]}
    assert run(out=tmp_path / "out", **flags) == 0
    before = load_file(tiny_pipeline.folder / "transformer/diffusion_pytorch_model.safetensors")
    after = kernels(tmp_path / "out")
    q = "diffusion_model.blocks.1.cross_attn.v"
    product = lora[f"{q}.lora_up.weight"] @ lora[f"{q}.lora_down.weight"]
    expected = {
        "blocks.1.attn2.to_v.kernel": (before["blocks.1.attn2.to_v.weight"] + product).T,
        "blocks.1.attn2.to_v.bias": before["blocks.1.attn2.to_v.bias"] + lora[f"{q}.diff_b"],
        "blocks.0.attn1.norm_k.scale": before["blocks.0.attn1.norm_k.weight"]
        + lora["diffusion_model.blocks.0.self_attn.norm_k.diff"],
        "blocks.0.scale_shift_table": before["blocks.0.scale_shift_table"]
        + lora["diffusion_model.blocks.0.diff_m"],
        "scale_shift_table": before["scale_shift_table"] + lora["diffusion_model.head.diff_m"],
        "proj_out.bias": before["proj_out.bias"] + lora["diffusion_model.head.head.diff_b"],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    unmoved = kernels(tiny_pipeline.folder)
    assert [name for name in after if np.array_equal(after[name], unmoved[name])] == []

    words = ["--sampler=euler", "--num_inference_steps=4", "--guidance_scale=1", "--flow_shift=5"]
    words += ["--time_grid=original", f"--checkpoint={tmp_path / 'out'}", "--prompt=a red 3"]
    assert sample.main(["sample.py", *words, f"--out={tmp_path / 'videos'}"]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_what_is_no_text_to_video_model_of_ours_is_refused(
    original, tiny_pipeline, tmp_path, capsys
):
    _, tensors = original

    def refused(words, **flags):
        assert run(out=tmp_path / "out", **flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()

    for name in ("self_forcing_dmd.safetensors", "wan_causal.safetensors"):
        save_file(tensors, tmp_path / name)
        refused("is a causal model (Self-Forcing", source=tmp_path / name)
    causal = tmp_path / "autoregressive_checkpoint"
    causal.mkdir()
    save_file(tensors, causal / "model.safetensors")
    refused("is a causal model", source=causal / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    (other / "config.json").write_text(json.dumps({"_class_name": "CausalWanModel"}))
    refused("is a causal model", source=other)

    gate = {f"blocks.{i}.to_gate_compress.{x}": values(DIM) for i in (0, 1) for x in ("weight",)}
    save_file(tensors | gate, tmp_path / "fastwan.safetensors")
    refused("FastVideo's sparse attention", source=tmp_path / "fastwan.safetensors")

    image = {"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": values(RANK, DIM)}
    save_file(lightx2v_lora() | image, tmp_path / "i2v.safetensors")
    refused(
        "is an image-to-video model (I2V): only Wan2.1's text-to-video",
        source=tiny_pipeline.folder,
        loras=[tmp_path / "i2v.safetensors"],
    )
    larger = lightx2v_lora(layers=3)
    save_file(larger, tmp_path / "larger.safetensors")
    assert run(source=tiny_pipeline.folder, out=tmp_path / "out",
               loras=[tmp_path / "larger.safetensors"]) == 2  # fmt: skip
    assert "match nothing: diffusion_model.blocks.2.cross_attn.k.diff_b" in capsys.readouterr().err
