"""Which part of a model a set of keys is, and under whose names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert import original

# In front of every key of ComfyUI's files, of PyTorch's wrappers and of diffusers' LoRAs.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.")

_SIGNS = (
    ("transformer", "original", r"blocks\.\d+\.(self|cross)_attn\..*"),
    ("transformer", "diffusers", r"blocks\.\d+\.attn[12]\..*"),
    ("vae", "original", r"(en|de)coder\.middle\..*"),
    ("vae", "diffusers", r"(en|de)coder\.mid_block\..*"),
    ("text_encoder", "original", r"blocks\.\d+\.attn\.[qkvo]\..*"),
    ("text_encoder", "transformers", r"encoder\.block\.\d+\.layer\..*"),
)

# Between the components of keys, where PyTorch's FSDP, checkpointing or compilation wrap modules.
_WRAPS = re.compile(r"_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")

# Beside the weights in some files, and no parameters: a tokenizer in the text encoder's.
IGNORED = ("spiece_model",)


@dataclass(frozen=True)
class Spelling:
    """part: of `parts.PARTS`; names: "original", "diffusers" or "transformers"; prefix: of keys."""

    part: str
    names: str
    prefix: str

    def translate(self, keys: Iterable[str]) -> dict[str, str]:
        """Each key and its name in diffusers' or transformers' checkpoints; unknown ones as is."""
        plain = {key: _unwrapped(key).removeprefix(self.prefix) for key in keys}
        if self.names != "original":
            return plain
        rules = original.names(self.part, _num_res_blocks(plain.values()))
        known = original.rename(rules, plain.values(), to_original=False)
        return {key: known.get(name, f"{name} (as it is)") for key, name in plain.items()}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Spelling | None:
    """The spelling of a file's keys, None if they are of no part of Wan2.1."""
    keys = [_unwrapped(key) for key in shapes]
    for prefix in (*(p for p in PREFIXES if any(key.startswith(p) for key in keys)), ""):
        plain = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        for part, names, sign in _SIGNS:
            if any(re.fullmatch(sign, key) for key in plain):
                return Spelling(part, names, prefix)
    return None


def _unwrapped(key: str) -> str:
    return _WRAPS.sub("", key)


def _num_res_blocks(keys: Iterable[str]) -> int:
    """Of an original VAE, whose decoder has 4 levels of one block more, and 3 upsamplings."""
    numbers = [int(m[1]) for m in (re.match(r"decoder\.upsamples\.(\d+)\.", k) for k in keys) if m]
    return max(1, (max(numbers, default=14) + 1 - 7) // 4)
