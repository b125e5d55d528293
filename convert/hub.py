"""Fetches what is needed of a Hugging Face repository, with its users' cache and token."""

import re
from collections.abc import Iterable
from pathlib import Path

from linvideo_jax.errors import UserError

# Per part: diffusers' folders, and the original repository's files.
_FILES = {
    "transformer": ("transformer/*", "config.json", "diffusion_pytorch_model*"),
    "vae": ("vae/*", "Wan2.1_VAE.pth"),
    "text_encoder": ("text_encoder/*", "models_t5_umt5-xxl-enc-bf16.pth"),
}
_ALWAYS = ("model_index.json", "config.json", "linvideo.safetensors", "scheduler/*", "tokenizer/*")
_TOKENIZER = "google/umt5-xxl/*"


def is_name(text: str) -> bool:
    """Whether this can be ORGANISATION/REPOSITORY, or one with /FILE, and is nothing local."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+)?", text)
    return bool(named) and not Path(text).exists() and not Path(text.split("/")[0]).exists()


def fetch(name: str, parts: Iterable[str]) -> Path:
    """The folder, or the file if one is named, in huggingface_hub's cache.

    UserError if it is not there and cannot be fetched.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, repository, *file = name.split("/", 2)
    repo = f"{owner}/{repository}"
    patterns = [*_ALWAYS, _TOKENIZER, *(file for part in parts for file in _FILES[part])]
    try:
        if file:
            return Path(hf_hub_download(repo, file[0]))
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # its own, httpx's and requests' errors have no common class
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".: ") if lines else type(error).__name__
        raise UserError(
            f"{name} is no file or folder here and could not be fetched from Hugging Face "
            f"({reason}): check the name, the connection and, for gated models, `hf auth login`."
        ) from error
