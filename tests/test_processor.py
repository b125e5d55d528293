"""linvideo_processor.py, the file that runs an exported student's linear layers in diffusers."""

import importlib.util

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import to_torch
from linvideo_jax import checkpoints
from linvideo_jax.models import module
from linvideo_jax.models.wan import LINEAR, SOFTMAX, WanTransformer


@pytest.fixture(scope="module")
def exported(tiny_pipeline, tmp_path_factory):
    """(checkpoint of a student whose layer 1 is linear, its folder in diffusers' layout)."""
    checkpoint = checkpoints.load(tiny_pipeline.folder)
    random = np.random.default_rng(0)
    checkpoint.transformer["blocks"]["attn1"]["feature_map"] = {
        name: random.normal(size=(2, 2, 16, 8)).astype(np.float32) for name in "qk"
    }
    folder = tmp_path_factory.mktemp("processor")
    checkpoints.save(
        folder / "student",
        config={**checkpoint.config, "linear_layers": [1], "feature_map": "hedgehog"},
        transformer=checkpoint.transformer,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer_folder,
        scheduler=checkpoint.scheduler,
        source="a test",
    )
    words = [f"--checkpoint={folder / 'student'}", f"--out={folder / 'out'}"]
    assert to_torch.main(["program", *words]) == 0
    return checkpoints.load(folder / "student", ("transformer",)), folder / "out"


def processor_of(folder):
    """The exported file as a module, found by its path as its users find it."""
    path = folder / "linvideo_processor.py"
    spec = importlib.util.spec_from_file_location("linvideo_processor", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_velocity_in_diffusers_is_ours(exported):
    student, folder = exported
    random = np.random.default_rng(1)
    latents = random.normal(size=(2, 3, 4, 6, 4)).astype(np.float32)
    text = random.normal(size=(2, 7, 24)).astype(np.float32)
    time = np.array([900.0, 250.0], np.float32)
    model = module.bind(WanTransformer, student.wan_config, student.transformer)
    inputs = (jnp.array(latents), jnp.array(time), jnp.array(text), None)
    ours = np.asarray(model(*inputs, mode=jnp.array([SOFTMAX, LINEAR])))

    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")

    def velocity():
        with torch.no_grad():
            states = torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy())
            out = theirs(states, torch.from_numpy(time), torch.from_numpy(text)).sample
        return out.numpy().transpose(0, 2, 3, 4, 1)

    assert np.abs(velocity() - ours).max() > 1e-2, "softmax everywhere is another model"
    layers = processor_of(folder).use_linear_layers(theirs, str(folder / "linvideo.safetensors"))
    assert layers == [1]
    np.testing.assert_allclose(velocity(), ours, atol=1e-4)


def test_model_card(exported):
    card = (exported[1] / "README.md").read_text()
    for sentence in (
        "1 of the 2 self-attention layers are linear (Hedgehog feature maps): 1, counted from 0.",
        "Weights from: a test.",
        "use_linear_layers(transformer",
        "license: apache-2.0",
        "None are recorded",
    ):
        assert sentence in card
