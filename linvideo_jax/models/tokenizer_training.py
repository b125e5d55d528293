"""A tokenizer of whole words from captions, in all the files of a diffusers checkpoint."""

import json
import math
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from linvideo_jax.models.tokenizer import WORD_START, clean

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MAX_VOCABULARY = 512


def build(captions: Iterable[str], out_folder: str | Path) -> int:
    """Writes a T5 tokenizer with one piece for each word of the captions; returns its size.

    Case is folded and punctuation read as white space. A word that no caption has becomes a word
    start and one unknown id. The files are spiece.model, tokenizer.json, tokenizer_config.json and
    special_tokens_map.json; the same set of words gives the same files. ValueError if there is no
    word, or more pieces than MAX_VOCABULARY.
    """
    normalizer = _normalizer()
    texts = (normalizer.normalize(clean(caption)) for caption in captions)
    words = sorted({word for text in texts for word in text.split(WORD_START) if word})
    # The bare word start keeps two unknown words apart, which sentencepiece would join into one.
    pieces = [WORD_START, *(WORD_START + word for word in words)]
    if not words or len(SPECIAL) + len(pieces) > MAX_VOCABULARY:
        raise ValueError(f"{len(words)} words: need 1 to {MAX_VOCABULARY - len(SPECIAL) - 1}.")
    # Equal scores: a word is one piece or unknown, so there is nothing to weigh.
    score = -math.log(len(pieces))
    pieces = [(piece, 0.0) for piece in SPECIAL.values()] + [(piece, score) for piece in pieces]

    model = sentencepiece_model_pb2.ModelProto.FromString(normalizer.serialized_model_proto())
    _complete(model, pieces)
    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    config = SPECIAL | {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    for name, content in (("tokenizer_config", config), ("special_tokens_map", SPECIAL)):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text)
    # Last, so that its presence says the folder is complete.
    _fast(pieces, model.normalizer_spec.precompiled_charsmap).save(str(folder / "tokenizer.json"))
    return len(pieces)


def _normalizer() -> sentencepiece.SentencePieceNormalizer:
    # Prompts are cleaned by ftfy before, which leaves little for sentencepiece's own rules of
    # Unicode normalisation (250 kB).
    sentencepiece.set_min_log_level(1)
    rules = dict(zip(string.ascii_uppercase, string.ascii_lowercase, strict=True))
    rules |= dict.fromkeys(string.punctuation, " ")
    return sentencepiece.SentencePieceNormalizer(
        norm_map=list(rules.items()),
        add_dummy_prefix=True,
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )


def _complete(model, pieces):
    types = sentencepiece_model_pb2.ModelProto.SentencePiece
    kinds = {"<pad>": types.CONTROL, "</s>": types.CONTROL, "<unk>": types.UNKNOWN}
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, types.NORMAL))
    spec = model.trainer_spec
    spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    spec.vocab_size = len(pieces)
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    spec.pad_piece, spec.eos_piece, spec.unk_piece = SPECIAL.values()
    spec.hard_vocab_limit = True
    model.normalizer_spec.name = "user_defined"


def _fast(pieces, charsmap):
    # The same parts that transformers' T5Tokenizer puts together when it loads the folder.
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    model.normalizer = normalizers.Precompiled(charsmap)
    space = {"replacement": WORD_START, "prepend_scheme": "always", "split": True}
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    model.decoder = decoders.Metaspace(**space)
    model.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    model.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL.values()])
    return model
