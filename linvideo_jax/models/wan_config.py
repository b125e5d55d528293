"""Sizes of a Wan2.1 transformer."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from linvideo_jax.errors import UserError

FEATURE_MAPS = ("hedgehog", "relu", "taylor")  # of `kernels.linear_attention.feature_maps`

_IMAGE_TO_VIDEO = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclass(frozen=True)
class WanConfig:
    """Sizes under the key names of diffusers' WanTransformer3DModel; `feature_map` is ours.

    `feature_map`: None, or one of FEATURE_MAPS if the layers have linear attention too.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: None = None
    added_kv_proj_dim: None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: None = None
    feature_map: str | None = None

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WanConfig":
        """Reads diffusers' config.json; keys that begin with "_" are ignored.

        Raises: UserError for an unknown key, or a variant of the architecture that is not Wan2.1's
        text-to-video model.
        """
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"Unknown keys in the transformer's config: {', '.join(unknown)}.")
        if "patch_size" in values:
            values["patch_size"] = tuple(values["patch_size"])
        config = cls(**values)
        for name in ("cross_attn_norm", "qk_norm", *_IMAGE_TO_VIDEO):
            if getattr(config, name) != getattr(cls, name):
                raise UserError(
                    f"The transformer's config has {name}={getattr(config, name)!r}; only Wan2.1 "
                    f"text-to-video models, {name}={getattr(cls, name)!r}, are supported."
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The values under diffusers' keys, without `feature_map`, ready for JSON."""
        values = asdict(self)
        del values["feature_map"]
        return {**values, "patch_size": list(self.patch_size)}
