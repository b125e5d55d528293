"""The pretrain stage with tiny networks: its parts, its pieces, and the losses."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from linvideo_jax import checkpoints, loop
from linvideo_jax.data import captions
from linvideo_jax.errors import UserError
from linvideo_jax.models import module, registry
from linvideo_jax.models.tokenizer_training import build
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.models.wan import WanConfig, WanTransformer
from linvideo_jax.stages import pretrain
from linvideo_jax.stages.pretrain import vae as vae_training


def tiny() -> registry.ModelSizes:
    """wan-digits in every respect but its widths and depths."""
    return registry.ModelSizes(
        transformer=WanConfig(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            ffn_dim=32,
            text_dim=16,
            freq_dim=16,
        ),
        vae=VAEConfig(base_dim=4, z_dim=16, num_res_blocks=1),
        text_encoder=UMT5Config(
            vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
    )


@pytest.fixture
def config(monkeypatch):
    """configs/digits_pretrain.py with tiny networks and a few steps."""
    monkeypatch.setitem(registry.MODELS, "wan_digits", tiny)
    path = Path(__file__).parents[1] / "configs" / "digits_pretrain.py"
    spec = importlib.util.spec_from_file_location("digits_pretrain_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.pretrain.parts = ("vae", "transformer")
    config.pretrain.vae.update(
        num_frames=1, batch_size=4, num_steps=6, validation_clips=2, dtype="float32", log_every=1
    )
    settings = config.pretrain.transformer
    settings.sizes.short.update(num_frames=5, num_clips=8, batch_size=4)
    settings.sizes.long.update(num_clips=0)
    settings.update(encode_batch_size=8, num_steps=4, dtype="float32", log_every=1)
    return config


def test_parts_then_a_piece_from_the_weights_alone(config, tmp_path):
    first = tmp_path / "first"
    pretrain.run(config, first)
    vae = loop.read_metrics(first / "state" / "vae")
    assert len(vae) == 6
    assert vae[-1]["loss"] < vae[0]["loss"]
    assert set(loop.read_json(first / "vae.json")) == {"psnr", "psnr_digits"}
    made = checkpoints.load(first / "final")
    assert made.linear_layers == ()
    assert made.sampling["num_frames"] == 25
    # Statistics of the trained latents, not Wan's.
    assert made.vae_config.latents_mean != VAEConfig().latents_mean
    ids, lengths = made.tokenizer.encode(["a red 3"])
    assert lengths.tolist() == [4]
    assert ids.shape[1] == 32

    config.checkpoint = str(first / "final")
    config.pretrain.parts = ("transformer",)
    second = tmp_path / "second"
    pretrain.run(config, second)
    later = checkpoints.load(second / "final")
    assert later.vae_config == made.vae_config
    jax.tree.map(np.testing.assert_array_equal, later.vae, made.vae)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), later.text_encoder, made.text_encoder
    )
    assert max(jax.tree.leaves(moved)) > 0  # trained together with the transformer
    assert not (second / "state" / "vae").exists()


def test_a_decoder_alone_keeps_the_latents(config, tmp_path):
    """The statistics too, for they are part of what a trained transformer sees."""
    sizes = tiny()
    parts = {
        "transformer": module.init(WanTransformer, sizes.transformer, 0),
        "vae": module.init(WanVAE, sizes.vae, 0),
        "text_encoder": module.init(UMT5Encoder, sizes.text_encoder, 0),
    }
    build(captions.vocabulary(), tmp_path / "tokenizer")
    checkpoints.save(
        tmp_path / "first",
        config=checkpoints.make_config(sizes.transformer, sizes.vae, sizes.text_encoder),
        tokenizer=tmp_path / "tokenizer",
        **parts,
    )
    config.checkpoint = str(tmp_path / "first")
    config.pretrain.parts = ("vae",)
    config.pretrain.vae.update(num_steps=2, freeze_encoder=True)
    pretrain.run(config, tmp_path / "second")
    later = checkpoints.load(tmp_path / "second" / "final", ("vae",))
    assert later.vae_config == sizes.vae
    for name, part in later.vae.items():
        same = jax.tree.leaves(jax.tree.map(np.array_equal, part, parts["vae"][name]))
        assert all(same) == (name in ("encoder", "quant_conv")), name


def test_pieces_of_minutes_fit_their_time_and_keep_their_plan(tmp_path):
    calls = []

    def trial(step):
        calls.append(step)
        return np.zeros(())

    assert loop.steps_within(0.0, 7, tmp_path, trial) == 7
    assert calls == []
    planned = loop.steps_within(0.01, 7, tmp_path, trial)
    assert planned > 7  # an update that takes no time
    assert loop.steps_within(5.0, 7, tmp_path, trial) == planned


def test_digit_pixels_weigh_more():
    video = np.zeros((1, 1, 2, 2, 3), np.float32)
    mask = np.array([[[[1.0, 0.0], [0.0, 0.0]]]], np.float32)
    latents = np.zeros((1, 1, 1, 1, 2), np.float32)
    losses = []
    for row, column in ((0, 0), (1, 1)):
        decoded = video.copy()
        decoded[0, 0, row, column] = 0.2
        loss, parts = vae_training.reconstruction_losses(
            video, mask, decoded, latents, latents, digit_weight=4.0, kl_weight=1.0
        )
        losses.append(float(loss))
        assert float(parts["kl"]) == 0.0  # a standard normal posterior
        np.testing.assert_allclose(parts["psnr"], 10 * np.log10(4 / (0.04 / 4)), rtol=1e-5)
    np.testing.assert_allclose(losses[0], 5 * losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[1], 0.04 / 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("vea",)}, "known are vae, classifier, transformer"),
        ({"transformer.sizes.short.num_clips": 0}, "sizes leaves steps without clips"),
        ({"transformer.sizes.short.every": 2}, "sizes leaves steps without clips"),
        ({"transformer.sizes.short.every": 0}, "sizes leaves steps without clips"),
        ({"transformer.remat": "foo"}, "remat is 'foo': choose one of none, products"),
    ],
)
def test_wrong_settings_are_refused(config, tmp_path, changes, message):
    config.pretrain.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        pretrain.run(config, tmp_path)
    assert not list(tmp_path.iterdir())
