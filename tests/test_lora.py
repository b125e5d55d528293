"""LoRA files in their usual spellings, merged as the formula says."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert import from_torch
from linvideo_jax import checkpoints

RANK, ALPHA, STRENGTH = 3, 2.0, 0.5
Q = "blocks.1.attn1.to_q.weight"
STEM = "transformer/diffusion_pytorch_model.safetensors"


def run(*words, **flags) -> int:
    return from_torch.main(["program", *words, *(f"--{k}={v}" for k, v in flags.items())])


def merged(tiny_pipeline, tmp_path, *loras, **flags):
    """The kernels and biases of the converted transformer, in PyTorch's layout."""
    words = [f"--lora={lora}" for lora in loras]
    source = tiny_pipeline.folder
    assert run(*words, source=source, out=tmp_path / "out", parts="transformer", **flags) == 0
    flat = checkpoints.read_flat(tmp_path / "out", ("transformer",))[1]["transformer"]
    return {name: np.asarray(array) for name, array in flat.items()}


def random(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


SPELLINGS = {
    "diffusers": ("transformer.blocks.1.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("base_model.model.blocks.1.attn1.to_q", ".lora_A.default.weight", ".lora_B.weight"),
    "original": ("diffusion_model.blocks.1.self_attn.q", ".lora_A.weight", ".lora_B.weight"),
    "bare": ("blocks.1.self_attn.q", ".lora_down.weight", ".lora_up.weight"),
    "comfyui": (
        "model.diffusion_model.blocks.1.self_attn.q",
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "kohya": ("lora_unet_blocks_1_self_attn_q", ".lora_down.weight", ".lora_up.weight"),
    "lycoris": ("lora_unet__blocks_1_self_attn_q", ".lora.down.weight", ".lora.up.weight"),
}


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize(("module", "a", "b"), SPELLINGS.values(), ids=SPELLINGS)
def test_low_rank(tiny_pipeline, tmp_path, module, a, b, alpha):
    down, up = random(RANK, 32), random(32, RANK)
    tensors = {module + a: down, module + b: up}
    if alpha:
        tensors[f"{module}.alpha"] = np.array(ALPHA, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    before = load_file(tiny_pipeline.folder / STEM)[Q]
    scale = STRENGTH * (ALPHA / RANK if alpha else 1)
    mine = merged(tiny_pipeline, tmp_path, f"{tmp_path / 'lora.safetensors'}:{STRENGTH}")
    expected = before + scale * up @ down
    np.testing.assert_allclose(mine["blocks.1.attn1.to_q.kernel"].T, expected, rtol=1e-5, atol=1e-6)
    untouched = load_file(tiny_pipeline.folder / STEM)["blocks.0.attn1.to_q.weight"]
    np.testing.assert_array_equal(mine["blocks.0.attn1.to_q.kernel"].T, untouched)


def test_differences_and_the_patch_convolution(tiny_pipeline, tmp_path):
    """diff, diff_b, diff_m, and a low-rank pair for a convolution; from a .pth file."""
    before = load_file(tiny_pipeline.folder / STEM)
    norm, bias, modulation = random(32), random(32) + 1, random(1, 6, 32)
    down, up = random(RANK, 4, 1, 2, 2), random(32, RANK, 1, 1, 1)
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": norm,
        "diffusion_model.blocks.0.norm3.diff_b": bias,
        "diffusion_model.blocks.0.diff_m": modulation,
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
    }
    path = tmp_path / "lora.pth"
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    mine = merged(tiny_pipeline, tmp_path, f"{path}:2")
    product = (up.reshape(32, RANK) @ down.reshape(RANK, -1)).reshape(32, 4, 1, 2, 2)
    expected = {
        "blocks.0.norm2.scale": before["blocks.0.norm2.weight"] + 2 * norm,
        "blocks.0.norm2.bias": before["blocks.0.norm2.bias"] + 2 * bias,
        "blocks.0.scale_shift_table": before["blocks.0.scale_shift_table"] + 2 * modulation,
        "patch_embedding.kernel": (before["patch_embedding.weight"] + 2 * product).transpose(
            2, 3, 4, 1, 0
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_several_add_up_and_are_rounded_once(tiny_pipeline, tmp_path):
    module = "blocks.1.self_attn.q"
    for name, strength in (("a", 1.0), ("b", 3.0)):
        save_file({f"{module}.diff": random(32, 32) * strength}, tmp_path / f"{name}.safetensors")
    loras = [f"{tmp_path / 'a.safetensors'}:1", f"{tmp_path / 'b.safetensors'}"]
    mine = merged(tiny_pipeline, tmp_path, *loras, dtype="bfloat16")
    expected = load_file(tiny_pipeline.folder / STEM)[Q] + random(32, 32) + 3 * random(32, 32)
    stored = mine["blocks.1.attn1.to_q.kernel"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(stored.T.astype(np.float32), expected, rtol=4e-3, atol=1e-3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [lora["strength"] for lora in manifest["loras"]] == [1.0, 1.0]
