"""Text to token ids: a tokenizer folder as diffusers' Wan checkpoints have it."""

import html
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int

from linvideo_jax.errors import UserError

PAD, EOS, UNK = 0, 1, 2
WORD_START = "▁"


def clean(text: str) -> str:
    """The text as Wan cleans it: ftfy, HTML entities decoded twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Prompts to padded ids with T5's pad 0, end of sequence 1 and unknown 2."""

    def __init__(self, folder: Path, ids: Callable[[str], list[int]], pieces: Sequence[str]):
        self.folder = folder
        self._ids = ids
        self._pieces = pieces

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or spiece.model where there is none.

        UserError if the folder has neither, or the file cannot be read or is not T5's kind.
        """
        folder = Path(folder)
        for name, read in (("tokenizer.json", _read_json), ("spiece.model", _read_sentencepiece)):
            path = folder / name
            if not path.is_file():
                continue
            try:
                ids, pieces = read(path)
            except Exception as error:  # tokenizers raises bare Exceptions
                raise UserError(f"{path} cannot be read as a tokenizer: {error}.") from error
            if pieces[:3] != ["<pad>", "</s>", "<unk>"]:
                raise UserError(f"{path} does not start with <pad>, </s>, <unk> as T5's files do.")
            return cls(folder, ids, pieces)
        raise UserError(f"{folder} has no tokenizer.json and no spiece.model: it is no tokenizer.")

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[Int[np.ndarray, "batch tokens"], Int[np.ndarray, "batch"]]:
        """Cleaned prompts as ids with the end-of-sequence id, and their lengths, both int32.

        Longer prompts are cut to max_length, the end-of-sequence id included. Rows are padded to
        the least multiple of 32 above the longest, so that few shapes are compiled and a pad
        follows every prompt, but never beyond max_length. The ids are those of transformers.
        """
        rows = [[*self._ids(clean(p))[: max_length - 1], EOS] for p in prompts]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = min(max_length, 32 * (int(lengths.max()) // 32 + 1))
        ids = np.full((len(rows), tokens), PAD, np.int32)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = values
        return ids, lengths

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the vocabulary cannot write, each once, in order.

        A word is unknown if its ids contain the unknown id: a vocabulary of whole words, such as
        `tokenizer_training.build` makes, cannot spell out a word that it does not hold.
        """
        words = dict.fromkeys(clean(prompt).split())
        unknown = (w for w in words if UNK in self._ids(w))
        return list(dict.fromkeys(w.strip(string.punctuation) or w for w in unknown))

    def words(self) -> list[str]:
        """All pieces that start a word, sorted: the known words if every piece is a whole one."""
        return sorted(p[1:] for p in self._pieces if p.startswith(WORD_START) and len(p) > 1)


def _read_json(path):
    model = tokenizers.Tokenizer.from_file(str(path))
    model.no_padding()
    model.no_truncation()
    pieces = [model.id_to_token(i) for i in range(model.get_vocab_size())]
    return lambda text: model.encode(text, add_special_tokens=False).ids, pieces


def _read_sentencepiece(path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return model.encode, [model.id_to_piece(i) for i in range(model.get_piece_size())]
