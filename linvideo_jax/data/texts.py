"""Text embeddings of a list of prompts, padded when they are asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


class Text(NamedTuple):
    """An embedding, zero from `length` on."""

    values: Float[np.ndarray, "tokens text_dim"]
    length: np.int32


class Texts:
    """Embeddings by prompt id; the last one is the negative prompt's.

    source: the bytes of each, [length, text_dim] of `dtype`, in memory or on disk; shape: [tokens,
    text_dim], to which they are padded.
    """

    def __init__(self, source: Sequence[bytes], shape: tuple[int, ...], dtype: str):
        self._source, self._shape, self._dtype = source, shape, jnp.dtype(dtype)

    @property
    def negative(self) -> int:
        """The id of the negative prompt."""
        return len(self._source) - 1

    def __getitem__(self, prompt: int) -> Text:
        text = np.frombuffer(self._source[prompt], self._dtype).reshape(-1, self._shape[1])
        values = np.zeros(self._shape, self._dtype)
        values[: len(text)] = text
        return Text(values, np.int32(len(text)))
