"""Wan models that are not Wan2.1's text-to-video, told by their configurations or keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linvideo_jax.errors import UserError

I2V = "an image-to-video model (I2V)"
FLF2V = "a first-and-last-frame model (FLF2V)"
VACE = "a VACE model"
A14B = "Wan2.2's A14B, two transformers in turn"
TI2V = "Wan2.2's TI2V-5B"
CAUSAL = "a causal model (Self-Forcing, CausVid's autoregressive one), which makes frames in blocks"
VSA = "a model of FastVideo's sparse attention (VSA, as FastWan), whose gates belong to it"

# The values that say so in a config.json or model_index.json, the most special first.
_BY_VALUE = (
    (CAUSAL, "_class_name", ("CausalWanModel", "CausalWanTransformer3DModel")),
    (VACE, "model_type", ("vace",)),
    (VACE, "_class_name", ("WanVACEPipeline", "WanVACETransformer3DModel", "VaceWanModel")),
    (TI2V, "model_type", ("ti2v",)),
    (TI2V, "expand_timesteps", (True,)),
    (TI2V, "in_channels", (48,)),
    (TI2V, "in_dim", (48,)),
    (TI2V, "z_dim", (48,)),
    (FLF2V, "model_type", ("flf2v",)),
    (I2V, "model_type", ("i2v",)),
    (I2V, "_class_name", ("WanImageToVideoPipeline",)),
    (I2V, "in_channels", (36,)),
    (I2V, "in_dim", (36,)),
)
# The keys that say so if they have a value at all.
_BY_KEY = (
    (VACE, "vace_layers"),
    (A14B, "boundary_ratio"),
    (FLF2V, "pos_embed_seq_len"),
    (I2V, "image_dim"),
    (I2V, "added_kv_proj_dim"),
)
_BY_TENSOR = (
    (VSA, r"\.to_gate_compress\."),
    (VACE, r"vace_(blocks|patch_embedding)\."),
    (FLF2V, r"img_emb\.emb_pos|image_embedder\.pos_embed"),
    (I2V, r"img_emb\.|image_embedder\.|\.k_img\.|\.add_k_proj\."),
    (TI2V, r"(encoder\.downsamples|decoder\.upsamples)\.\d+\.(downsamples|upsamples)\."),
    (TI2V, r"encoder\.down_blocks\.\d+\.(resnets|downsampler)\."),
)
_WORDS = "only Wan2.1's text-to-video models are supported"


def refuse(path: Path | str, what: str) -> UserError:
    """The error for a model of another kind."""
    return UserError(f"{path} is {what}: {_WORDS}.")


def check_configs(path: Path, *configs: Mapping[str, Any]) -> None:
    """UserError if one of a model's configurations is of a variant."""
    for config in configs:  # two transformers are named before what each of them is
        if (config.get("transformer_2") or [None])[0]:
            raise refuse(path, A14B)
    for what, key in _BY_KEY:
        if any(config.get(key) is not None for config in configs):
            raise refuse(path, what)
    for what, key, values in _BY_VALUE:
        if any(config.get(key) in values for config in configs if config.get(key) is not None):
            raise refuse(path, what)
    for config in configs:
        kind = config.get("model_type", "t2v")
        if config.get("_class_name") == "WanModel" and kind != "t2v":
            raise refuse(path, f"of the kind {kind!r}")


def check_tensors(path: Path | str, part: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError if keys or shapes are of a variant, whoever named them."""
    for what, pattern in _BY_TENSOR:
        if any(re.search(pattern, key) for key in shapes):
            raise refuse(path, what)
    for key, shape in shapes.items():
        if part == "transformer" and key.endswith("patch_embedding.weight") and len(shape) == 5:
            if shape[:2] == (3072, 48):
                raise refuse(path, TI2V)
            if shape[1] == 36:
                raise refuse(path, f"{I2V} of Wan2.2's A14B")
        if part == "vae" and re.search(r"encoder\.conv(1|_in)\.weight", key) and shape[1] == 12:
            raise refuse(path, f"the VAE of {TI2V}")


# Self-Forcing-Plus distils models that see all frames at once.
_BY_NAME = (
    (A14B, r"(high|low)_?noise"),
    (CAUSAL, r"self[_-]?forcing(?![_-]?plus)|causal|autoregressive"),
)


def check_name(path: Path) -> None:
    """UserError if the files' names say that this is a variant that nothing else tells.

    One of A14B's two transformers, of its text-to-video model, and causal models have the keys and
    shapes of Wan2.1's own.
    """
    words = {path.name, *(p.name for p in path.iterdir())} if path.is_dir() else {path.name}
    if path.parent.name.startswith("autoregressive_checkpoint"):  # CausVid's, with model.pt in it
        words.add(path.parent.name)
    for what, pattern in _BY_NAME:
        if any(re.search(pattern, word, re.IGNORECASE) for word in words):
            raise refuse(path, what)
