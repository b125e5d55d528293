"""Text embeddings: every prompt is encoded once, and kept on disk for later runs."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from linvideo_jax import folders
from linvideo_jax.models.module import Params, bind
from linvideo_jax.models.tokenizer import Tokenizer
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder
from linvideo_jax.models.wan import TEXT_TOKENS

# Text is padded to the next multiple of this many tokens: one compilation for each.
TEXT_BUCKET = 32
# Prompts of one padded length are encoded together, at most this many tokens: activations stay far
# smaller than the 11 GB of umt5-xxl.
TOKENS_AT_ONCE = 256


def text_bucket(length: int) -> int:
    """The padded length of a text: room for one pad token, unless all of Wan's 512 are taken."""
    return min((length // TEXT_BUCKET + 1) * TEXT_BUCKET, TEXT_TOKENS)


def default_folder() -> Path:
    """Where sample.py keeps embeddings; it may be deleted at any time."""
    return folders.user_cache() / "text_embeddings"


@partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(params, ids, lengths, config, dtype):
    return bind(UMT5Encoder, config, params)(ids, lengths, dtype=dtype).astype(dtype)


class TextEmbeddings:
    """Embeddings of the prompts added so far, in the host's memory and perhaps in `folder`.

    A file there is named by a hash of `mark` (of the text encoder), the dtype and the prompt's
    tokens, so that it serves every run of the same model; one that cannot be read is made again,
    and a folder that cannot be written is done without. Kept in `dtype`, the one that the encoder
    computes in and the transformer casts to.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: UMT5Config,
        dtype: Any,
        mark: Callable[[], str],
        folder: Path | None = None,
    ):
        self._tokenizer, self._config, self._dtype = tokenizer, config, np.dtype(dtype)
        self._mark, self._folder = mark, folder
        self._known: dict[str, np.ndarray] = {}

    def __getitem__(self, prompt: str) -> Float[np.ndarray, "tokens text_dim"]:
        """The embedding of a prompt that was added, without pads."""
        return self._known[prompt]

    def padded(
        self, prompts: Sequence[str], tokens: int
    ) -> Float[np.ndarray, "prompts tokens text_dim"]:
        """Embeddings side by side, zero behind their ends."""
        result = np.zeros((len(prompts), tokens, self._config.d_model), self._dtype)
        for row, prompt in zip(result, prompts, strict=True):
            row[: len(self[prompt])] = self[prompt]
        return result

    def add(self, prompts: Iterable[str], params: Callable[[], Params]) -> None:
        """Encodes the prompts that are not known; `params()` gives the text encoder's parameters.

        A batch holds prompts of one padded length and is filled up to one size, so that a prompt's
        embedding does not depend on the others.
        """
        buckets: dict[int, list[tuple[str, np.ndarray, Path | None]]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt in self._known:
                continue
            ids, lengths = self._tokenizer.encode([prompt])
            tokens = ids[0, : lengths[0]]
            path = self._path(tokens)
            found = path and _read(path, (len(tokens), self._config.d_model), self._dtype)
            if found is not None:
                self._known[prompt] = found
            else:
                buckets.setdefault(text_bucket(len(tokens)), []).append((prompt, tokens, path))
        for bucket, missing in sorted(buckets.items()):
            size = max(1, TOKENS_AT_ONCE // bucket)
            for first in range(0, len(missing), size):
                self._encode(missing[first : first + size], size, bucket, params())

    def _encode(self, batch, size: int, bucket: int, params: Params) -> None:
        ids, lengths = np.zeros((size, bucket), np.int32), np.ones(size, np.int32)
        for i, (_, tokens, _) in enumerate(batch):
            ids[i, : len(tokens)], lengths[i] = tokens, len(tokens)
        arrays = jnp.asarray(ids), jnp.asarray(lengths)
        text = np.asarray(_encode(params, *arrays, self._config, self._dtype))
        for row, (prompt, tokens, path) in zip(text, batch, strict=False):
            self._known[prompt] = row[: len(tokens)].copy()
            if path:
                _write(path, self._known[prompt])

    def _path(self, tokens: np.ndarray) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{self._mark()} {self._dtype} {self._config}".encode())
        digest.update(np.asarray(tokens, np.int32).tobytes())
        return self._folder / f"{digest.hexdigest()}.npy"


def _read(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    try:
        stored = np.load(path, allow_pickle=False)
        # numpy writes bfloat16 as two bytes without a name.
        return stored.view(dtype) if stored.shape == shape else None
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, embedding: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.save(file, embedding)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
