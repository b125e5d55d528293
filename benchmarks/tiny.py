"""A teacher so small that a whole run takes seconds, for what needs many runs."""

from pathlib import Path

import jax
import numpy as np

from linvideo_jax import checkpoints
from linvideo_jax.data import captions
from linvideo_jax.models.module import shapes
from linvideo_jax.models.tokenizer_training import build
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.models.wan import WanConfig, WanTransformer

SAMPLING = {
    "num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16, "num_frames": 5,
}  # fmt: skip


def write_teacher(folder: Path, num_layers: int = 3) -> Path:
    """A checkpoint with random weights in `folder`; it knows the words of the moving digits.

    Its VAE halves time and both sides once: 5 frames of 16 px are latents of 3 x 8 x 8.
    """
    folder = Path(folder)
    words = folder.with_name(f"{folder.name}_words")
    vocabulary = build(captions.vocabulary(), words)
    models = {
        "transformer": WanConfig(
            num_layers=num_layers, num_attention_heads=2, attention_head_dim=12, ffn_dim=32,
            in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ),
        "vae": VAEConfig(
            base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,),
            latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
        ),
        "text_encoder": UMT5Config(
            vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
    }  # fmt: skip
    classes = {"transformer": WanTransformer, "vae": WanVAE, "text_encoder": UMT5Encoder}
    rng = np.random.default_rng(0)
    params = {
        part: jax.tree.map(
            lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
            shapes(classes[part], config),
        )
        for part, config in models.items()
    }
    # Queries and keys large enough that attention is far from even.
    for norm in ("norm_q", "norm_k"):
        params["transformer"]["blocks"]["attn1"][norm]["scale"] += 2.0
    checkpoints.save(
        folder,
        config=checkpoints.make_config(**models, sampling=SAMPLING),
        **params,
        tokenizer=words,
    )
    return folder
