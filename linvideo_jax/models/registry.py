"""Model names of configurations, and the sizes behind them."""

from dataclasses import dataclass

from linvideo_jax.errors import UserError
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig


@dataclass(frozen=True)
class ModelSizes:
    """Configurations of the three networks of one video model."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config


def wan_digits() -> ModelSizes:
    """Wan2.1's architecture in small: 96 x 96 clips of moving handwritten digits."""
    return ModelSizes(
        transformer=WanConfig(
            num_layers=12,
            num_attention_heads=6,
            attention_head_dim=32,
            ffn_dim=640,
            text_dim=128,
            freq_dim=256,
            in_channels=16,
            out_channels=16,
        ),
        vae=VAEConfig(base_dim=16, z_dim=16, num_res_blocks=1),
        text_encoder=UMT5Config(
            vocab_size=512, d_model=128, d_kv=32, d_ff=320, num_layers=3, num_heads=4
        ),
    )


MODELS = {"wan_digits": wan_digits}


def sizes(name: str) -> ModelSizes:
    """The sizes of a named model; UserError for a name that is none."""
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; choose one of {', '.join(sorted(MODELS))}.")
    return MODELS[name]()
