"""Model names of configurations, and the sizes behind them."""
# ruff: noqa: RUF001 (the published negative prompt has full-width commas)

from dataclasses import dataclass, replace

from linvideo_jax.errors import UserError
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig


@dataclass(frozen=True)
class ModelSizes:
    """Configurations of the three networks of one video model; video: height, width and frames of
    what it was trained on, the largest if there are several."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    video: tuple[int, int, int] = (480, 832, 81)


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
        video=(96, 96, 25),
    )


def wan2_1_t2v_1_3b() -> ModelSizes:
    """Wan2.1-T2V-1.3B: 1,418,996,800 parameters of the transformer, for 480p."""
    return ModelSizes(WanConfig(), VAEConfig(), UMT5Config())


def wan2_1_t2v_14b() -> ModelSizes:
    """Wan2.1-T2V-14B: 14,288,491,584 parameters of the transformer, for 480p and 720p."""
    transformer = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)
    return ModelSizes(transformer, VAEConfig(), UMT5Config(), (720, 1280, 81))


MODELS = {
    "wan_digits": wan_digits,
    "wan2_1_t2v_1_3b": wan2_1_t2v_1_3b,
    "wan2_1_t2v_14b": wan2_1_t2v_14b,
}

# `sample_neg_prompt` of wan/configs/shared_config.py: garish, overexposed, static, blurred details,
# subtitles, ..., walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def negative_prompt(transformer: WanConfig | None) -> str:
    """What Wan's own code guides away from, for a transformer of its sizes; else nothing."""
    published = (wan2_1_t2v_1_3b().transformer, wan2_1_t2v_14b().transformer)
    plain = transformer and replace(transformer, feature_map=None)
    return WAN_NEGATIVE_PROMPT if plain in published else ""


def sizes(name: str) -> ModelSizes:
    """The sizes of a named model; UserError for a name that is none."""
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; choose one of {', '.join(sorted(MODELS))}.")
    return MODELS[name]()
