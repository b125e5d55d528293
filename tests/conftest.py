"""A tiny random WanPipeline of diffusers, saved once a session."""

import logging
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

CAPTIONS = (
    "a red 3 moves right and a blue 7 moves up on a green background",
    "the yellow nine goes slowly down and bounces on black",
)
# Compilation is most of the time. What subprocesses compile too: they inherit it.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if os.environ.get("JAX_PLATFORMS") == "cpu":  # the first of them holds for GPUs too
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory) -> Path:
    """Where sample.py keeps text embeddings during the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def no_warning():
    """`with no_warning():` fails on any warning, of `warnings` or of the libraries' loggers."""

    @contextmanager
    def watched():
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

    return watched


class TinyPipeline(NamedTuple):
    """diffusers' pipeline object, and the folder that save_pretrained wrote."""

    theirs: object
    folder: Path


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> TinyPipeline:
    """Wan2.1's architecture in every part, with odd sizes; its defaults fit one small clip."""
    import json

    import diffusers
    import torch
    import transformers

    from linvideo_jax.models.tokenizer_training import build

    folder = tmp_path_factory.mktemp("pipeline")
    vocabulary = build(CAPTIONS, folder / "words")
    torch.manual_seed(0)
    text_encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=vocabulary + 3, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3
        )
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )
    for module in (text_encoder, transformer, vae):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):  # most start at zero, which would hide a lost one
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "saved")
    defaults = {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 48,
        "num_frames": 5,
    }
    (folder / "saved" / "config.json").write_text(json.dumps(defaults))
    return TinyPipeline(pipeline, folder / "saved")


@pytest.fixture(scope="session")
def ours(tiny_pipeline, tmp_path_factory) -> Path:
    """The tiny pipeline, converted."""
    from convert import from_torch

    out = tmp_path_factory.mktemp("convert") / "ours"
    words = [f"--source={tiny_pipeline.folder}", f"--out={out}"]
    assert from_torch.main(["from_torch.py", *words]) == 0
    return out


@pytest.fixture
def source(tiny_pipeline, tmp_path) -> Path:
    """A copy of the tiny pipeline's folder, to be damaged."""
    return shutil.copytree(tiny_pipeline.folder, tmp_path / "source")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """Folder of a random teacher."""
    from benchmarks import tiny

    return tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="session")
def tiny_config(tiny_teacher, tmp_path_factory):
    """configs/digits.py, cut down to the tiny teacher and a few steps."""
    from linvideo_jax import config_files

    config = config_files.load(str(Path(__file__).parents[1] / "configs" / "digits.py"))
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(
        "a red 3 moves slowly straight up on a gray background\na blue 7\nthe white two\n"
    )
    config.checkpoint, config.prompts, config.dtype = str(tiny_teacher), str(prompts), "float32"
    config.collect.update(num_videos=6, batch_size=2)
    config.transfer.update(
        target=2,
        num_steps=24,
        batch_size=4,
        warmup_steps=6,
        round_at=16,
        lr_warmup_steps=2,
        save_every=4,
        log_every=1,
    )
    return config
