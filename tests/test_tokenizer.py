"""Token ids against transformers, text embeddings against diffusers' WanPipeline."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from test_umt5_parity import our_params, transformers_model

from linvideo_jax.data.captions import MAX_WORDS, captions, vocabulary
from linvideo_jax.data.digits import sample_attributes
from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.tokenizer import Tokenizer, clean
from linvideo_jax.models.tokenizer_training import build
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder

CAPTIONS = (
    "a red 3 moves right slowly and a blue 7 moves up on a green background",
    "the yellow nine goes downward, bouncing, over a black background",
)
PROMPTS = (
    *CAPTIONS,
    "",
    "  \n\t ",
    "A RED 3, moves\u00a0right -- slowly!",
    "a red&nbsp;3 &amp;amp; a blue 7 &lt;b&gt;",
    "“Größe” 三 красный 3️⃣ e\u0301clair \u202e\u200b 🎈🎈",
    "a \uff13 \uff4doves ﬁne Â£ schÃ¶n",
    "unheard of words, elephants red-blue reds 33 a3",
    "</s> red <unk> <pad>blue <extra_id_0>",
    "red " * 510,
    "red " * 511,
    "blue zebra " * 700,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build(CAPTIONS, folder)
    return folder


@pytest.mark.parametrize("files", ["all", "without tokenizer.json"])
@pytest.mark.parametrize("name", ["AutoTokenizer", "T5TokenizerFast"])
def test_ids_equal_transformers(folder, tmp_path, name, files, no_warning):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if files != "all":
        (tmp_path / "tokenizer.json").unlink()
    with no_warning():
        theirs = getattr(transformers, name).from_pretrained(tmp_path)
        expected = theirs(
            [clean(p) for p in PROMPTS], padding="max_length", max_length=512, truncation=True
        )
    ours = Tokenizer.load(folder)
    assert len(theirs) == len(ours) < 512
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    ids, lengths = ours.encode(PROMPTS)
    assert ids.shape == (len(PROMPTS), 512) and ids.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(lengths, np.sum(expected.attention_mask, axis=1))


def test_sentencepiece_file_gives_the_same_ids(folder, tmp_path):
    shutil.copy(folder / "spiece.model", tmp_path)
    # A special token's name is plain text to sentencepiece.
    prompts = [p for p in PROMPTS if "</s>" not in p]
    for ours, theirs in zip(
        Tokenizer.load(tmp_path).encode(prompts),
        Tokenizer.load(folder).encode(prompts),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_padding(folder):
    tokenizer = Tokenizer.load(folder)
    for words, tokens in ((0, 32), (30, 32), (31, 64), (32, 64), (510, 512), (511, 512)):
        ids, lengths = tokenizer.encode(["red", "red " * words])
        assert ids.shape == (2, tokens)
        np.testing.assert_array_equal(lengths, (2, words + 1))
        assert ids[1, words] == 1 and not ids[1, words + 1 :].any()
    ids, lengths = tokenizer.encode(["red " * 50], max_length=20)
    assert ids.shape == (1, 20) and lengths[0] == 20 and ids[0, -1] == 1


def test_unknown_words(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.unknown_words("A Red 3, moves -- (slowly)!") == []
    assert tokenizer.unknown_words("") == []
    prompt = "the purple 3, a &quot;purple&quot; reds red-ish 33 Größe."
    assert tokenizer.unknown_words(prompt) == ["purple", "reds", "red-ish", "33", "Größe"]
    assert tokenizer.words() == sorted(set(" ".join(CAPTIONS).replace(",", "").split()))


def test_every_word_of_the_captions_is_one_piece(tmp_path):
    rng = np.random.default_rng(0)
    texts = captions(sample_attributes(rng, 3000, 25, "train"), rng)
    assert build(texts, tmp_path) < 512
    tokenizer = Tokenizer.load(tmp_path)
    assert tuple(tokenizer.words()) == vocabulary()
    ids, lengths = tokenizer.encode(texts)
    assert ids.shape[1] == 32 and not np.any(ids == 2)
    np.testing.assert_array_equal(lengths, [len(t.split()) + 1 for t in texts])
    assert lengths.max() <= MAX_WORDS + 1


def test_the_same_words_give_the_same_files(folder, tmp_path):
    build(reversed(CAPTIONS * 2), tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    with pytest.raises(ValueError, match="words"):
        build([" ".join(f"w{i}" for i in range(600))], tmp_path / "many")
    with pytest.raises(ValueError, match="words"):
        build(["..."], tmp_path / "none")
    assert not (tmp_path / "many").exists()


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:300])
        with pytest.raises(UserError, match=name):
            Tokenizer.load(tmp_path)
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"][0][0], other["added_tokens"] = "<s>", []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="<pad>"):
        Tokenizer.load(tmp_path)


def test_text_embeddings_equal_wan_pipeline(folder, tmp_path, no_warning):
    tokenizer = Tokenizer.load(folder)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3
    )
    model = transformers_model(config)
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(folder, tmp_path / "tokenizer")
    absent = dict.fromkeys(("transformer", "transformer_2", "vae", "scheduler"))
    index = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: [None, None] for name in absent}
    index |= {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    prompts = [PROMPTS[i] for i in (0, 1, 2, 6, 12)]
    with no_warning(), torch.no_grad():
        pipe = diffusers.WanPipeline.from_pretrained(tmp_path, **absent)
        theirs, negative = pipe.encode_prompt(prompts, "", max_sequence_length=512)

    @jax.jit
    def encode(params, ids, lengths):
        return module.bind(UMT5Encoder, config, params)(ids, lengths)

    ours = encode(our_params(model), *tokenizer.encode(prompts))
    for our, their in zip(ours, theirs.numpy(), strict=True):
        assert np.linalg.norm(our - their) < 1e-4 * np.linalg.norm(their)
    # Rows are independent, and a short batch is not padded to 512: the rest would be zero.
    short = encode(our_params(model), *tokenizer.encode([""]))
    np.testing.assert_allclose(short[0], negative[0, :32].numpy(), atol=1e-4)
    assert not negative[0, 32:].any()
