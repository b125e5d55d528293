"""Sizes of a network from the shapes of its tensors, for files that come without a config.json."""

import re
from collections.abc import Mapping
from typing import Any

from linvideo_jax.errors import UserError
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig

Shapes = Mapping[str, tuple[int, ...]]

# Every published Wan's; shapes do not tell it.
HEAD_DIM = 128

# The original config.json's names of what shapes tell too.
ORIGINAL = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "out_dim": "out_channels",
}


def derive(part: str, shapes: Shapes, where: str, config: Mapping[str, Any] | None = None) -> Any:
    """A part's configuration from shapes by diffusers' names.

    config: the original repository's config.json of the transformer, which says how many heads
    there are. UserError if it contradicts the shapes, or a tensor that tells a size is not there.
    """
    try:
        if part == "transformer":
            model = _transformer(shapes, where, config or {})
            _check_original(model, config or {}, where)
            return model
        return _vae(shapes) if part == "vae" else _text_encoder(shapes)
    except KeyError as error:
        raise UserError(f"{where} lacks {error.args[0]}, without which it is no {part}.") from None
    except (IndexError, ValueError) as error:
        raise UserError(f"{where} has tensors of shapes that fit no {part} ({error}).") from None


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number after the prefix."""
    found = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in shapes)
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise KeyError(f"{prefix}.0")
    return max(numbers) + 1


def _transformer(shapes: Shapes, where: str, config: Mapping[str, Any]) -> WanConfig:
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    heads = config.get("num_heads") or dim // HEAD_DIM
    if not heads or dim % heads or (dim % HEAD_DIM and "num_heads" not in config):
        raise UserError(
            f"{where} is {dim} wide, which are no heads of {HEAD_DIM}: put its config.json there."
        )
    pixels = patch_size[0] * patch_size[1] * patch_size[2]
    return WanConfig(
        patch_size=tuple(patch_size),
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // pixels,
        text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        freq_dim=shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
        num_layers=_count(shapes, "blocks"),
        eps=config.get("eps", WanConfig.eps),
    )


def _check_original(model: WanConfig, config: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"{theirs} is {config[theirs]} there but {getattr(model, ours)} here"
        for theirs, ours in ORIGINAL.items()
        if config.get(theirs, getattr(model, ours)) != getattr(model, ours)
    ]
    if config.get("dim", model.dim) != model.dim:
        wrong.append(f"dim is {config['dim']} there but {model.dim} here")
    if wrong:
        raise UserError(f"config.json contradicts the tensors of {where}: {', '.join(wrong)}.")


def _vae(shapes: Shapes) -> VAEConfig:
    """Published multiples and latent statistics, which shapes do not tell."""
    z_dim = shapes["post_quant_conv.weight"][0]
    if z_dim != VAEConfig.z_dim:
        raise ValueError(
            f"{z_dim} channels of latents; the statistics of other than 16 are unknown"
        )
    return VAEConfig(
        base_dim=shapes["encoder.conv_in.weight"][0],
        decoder_base_dim=None,
        num_res_blocks=_count(shapes, "decoder.up_blocks.0.resnets") - 1,
    )


def _text_encoder(shapes: Shapes) -> UMT5Config:
    layer = "encoder.block.0.layer"
    vocab_size, d_model = shapes["shared.weight"]
    buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
