"""Text embeddings: encoded once, kept on disk, the same from there."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax import checkpoints, turns
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.text import TOKENS_AT_ONCE

PROMPTS = [
    "a red 3 moves right",
    "the yellow nine goes slowly down, and a blue 7 moves up on a green background",
    "red " * 40,
]


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
    return checkpoints.load(tiny_pipeline.folder)


@pytest.fixture
def refuse_to_encode(monkeypatch):
    def refuse():
        monkeypatch.setattr(turns.Turns, "params", lambda *_: pytest.fail("encoded again"))

    return refuse


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_second_run_reads_what_the_first_has_encoded(loaded, tmp_path, dtype, refuse_to_encode):
    text, lengths = Pipeline(loaded, dtype, text_folder=tmp_path).encode_prompts(PROMPTS)
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)
    again = Pipeline(loaded, dtype, text_folder=tmp_path)
    refuse_to_encode()
    found, same_lengths = again.encode_prompts(PROMPTS)
    np.testing.assert_array_equal(found, text)
    np.testing.assert_array_equal(same_lengths, lengths)
    assert np.abs(np.asarray(text)[0, : lengths[0]]).max() > 0.1
    assert not np.asarray(text)[0, lengths[0] :].any()


def test_files_belong_to_one_model_prompt_and_dtype(loaded, tmp_path):
    Pipeline(loaded, text_folder=tmp_path).encode(PROMPTS[:1])
    trained = dict(loaded.text_encoder)
    trained["final_layer_norm"] = {"scale": 1.5 * trained["final_layer_norm"]["scale"]}
    other = checkpoints.Checkpoint(**{**vars(loaded), "text_encoder": trained})
    runs = [(loaded, jnp.float32), (other, jnp.float32), (loaded, jnp.bfloat16)]
    for checkpoint, dtype in runs:
        Pipeline(checkpoint, dtype, text_folder=tmp_path).encode(PROMPTS[:1])
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_files_are_made_again_and_a_folder_may_refuse(loaded, tmp_path):
    folder = tmp_path / "cache"
    whole, _ = Pipeline(loaded, text_folder=folder).encode_prompts(PROMPTS)
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    cut, empty, other = sizes
    cut.write_bytes(cut.read_bytes()[:-8])
    empty.write_bytes(b"")
    np.save(other, np.zeros((2, 2), np.float32))
    again, _ = Pipeline(loaded, text_folder=folder).encode_prompts(PROMPTS)
    np.testing.assert_array_equal(again, whole)
    assert {path: path.stat().st_size for path in folder.iterdir()} == sizes

    (tmp_path / "file").write_text("")
    kept, _ = Pipeline(loaded, text_folder=tmp_path / "file").encode_prompts(PROMPTS)
    np.testing.assert_array_equal(kept, whole)


def test_a_prompt_does_not_depend_on_those_beside_it(loaded):
    """More prompts than fit into a batch, in two orders and alone: the same bits."""
    many = [f"{'red ' * (i % 3)}3 moves {'up ' * i}" for i in range(TOKENS_AT_ONCE // 32 + 3)]
    pipeline, backwards, alone = (Pipeline(loaded) for _ in range(3))
    pipeline.encode(many)
    backwards.encode(many[::-1])
    alone.encode(many[4:5])
    for prompt in many:
        np.testing.assert_array_equal(pipeline.texts[prompt], backwards.texts[prompt])
    np.testing.assert_array_equal(alone.texts[many[4]], pipeline.texts[many[4]])


def test_networks_take_turns_and_give_the_same(tiny_pipeline, loaded, monkeypatch):
    """From disk, one part at a time; each is read once, however often its turn comes."""
    lazy = turns.open_folder(tiny_pipeline.folder)
    assert lazy.transformer is lazy.vae is lazy.text_encoder is None
    for part in ("transformer", "vae", "text_encoder"):
        assert turns.mark(lazy, part) == turns.mark(loaded, part)
    read, original = [], turns.Turns._read
    monkeypatch.setattr(
        turns.Turns, "_read", lambda self, part: read.append(part) or original(self, part)
    )
    settings = Settings.of(loaded)
    ours, whole = Pipeline(lazy), Pipeline(loaded)
    prompts, seeds = PROMPTS[:2] + PROMPTS[:1], [3, 4, 5]
    wanted = whole.latents(prompts, seeds, settings, 2)
    for rows, latents in ours.batches(prompts, seeds, settings, 2):
        np.testing.assert_array_equal(latents, wanted[rows])
        one = latents[:1]
        np.testing.assert_array_equal(ours.decode(one), whole.decode(one))
        assert list(ours._turns._on_device) == ["vae"]
    assert read == ["text_encoder", "transformer", "vae"]


def test_large_matrices_take_the_compute_dtype_and_leave_after_their_turn(tiny_pipeline):
    parts = turns.Turns(turns.open_folder(tiny_pipeline.folder), jnp.bfloat16)
    transformer = parts.params("transformer")
    assert transformer["blocks"]["attn1"]["to_q"]["kernel"].dtype == jnp.bfloat16
    for path in ("proj_out", "patch_embedding"):
        assert transformer[path]["kernel"].dtype == jnp.float32
    assert transformer["condition_embedder"]["time_proj"]["kernel"].dtype == jnp.float32
    assert transformer["blocks"]["scale_shift_table"].dtype == jnp.float32
    on_device = weakref.ref(transformer["proj_out"]["kernel"])
    del transformer
    assert on_device() is not None
    assert parts.params("text_encoder")["shared"]["embedding"].dtype == jnp.bfloat16
    assert parts.params("vae")["post_quant_conv"]["kernel"].dtype == jnp.float32
    assert on_device() is None, "the transformer must have left the device"


def test_resident_networks_stay_on_the_device(tiny_pipeline):
    """The text encoder leaves; the others are read and moved once."""
    parts = turns.Turns(turns.open_folder(tiny_pipeline.folder), jnp.bfloat16, resident=True)
    embedding = weakref.ref(parts.params("text_encoder")["shared"]["embedding"])
    transformer = parts.params("transformer")
    assert embedding() is None
    parts.params("vae")
    parts.params("text_encoder")
    assert parts.params("transformer") is transformer
    assert list(parts._on_device) == ["transformer", "vae", "text_encoder"]
