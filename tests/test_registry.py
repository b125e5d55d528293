"""Named models: exact sizes, and the prompts that they are guided away from."""

from dataclasses import replace
from math import prod

import pytest

from linvideo_jax import checkpoints
from linvideo_jax.errors import UserError
from linvideo_jax.models import registry
from linvideo_jax.parts import flat_shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("wan2_1_t2v_1_3b", 1_418_996_800), ("wan2_1_t2v_14b", 14_288_491_584)],
)
def test_parameters_of_the_published_transformers(name, parameters):
    """Counted from abstract shapes; no memory is taken."""
    shapes = flat_shapes("transformer", registry.sizes(name).transformer)
    assert sum(map(prod, shapes.values())) == parameters


def test_parameters_of_umt5_xxl_and_the_vae():
    sizes = registry.wan2_1_t2v_1_3b()
    # Embedding, 24 layers of attention, feed-forward, bias and two norms, and the final norm.
    d, inner, ff = 4096, 64 * 64, 10240
    layer = 4 * d * inner + 3 * d * ff + 32 * 64 + 2 * d
    counted = sum(map(prod, flat_shapes("text_encoder", sizes.text_encoder).values()))
    assert counted == 256_384 * d + 24 * layer + d == 5_680_910_336
    assert sum(map(prod, flat_shapes("vae", sizes.vae).values())) == 126_892_531


def test_only_real_wan_has_wans_negative_prompt():
    assert registry.negative_prompt(registry.wan_digits().transformer) == ""
    assert registry.negative_prompt(None) == ""
    for sizes in (registry.wan2_1_t2v_1_3b(), registry.wan2_1_t2v_14b()):
        for config in (sizes.transformer, replace(sizes.transformer, feature_map="hedgehog")):
            words = registry.negative_prompt(config)
            assert words.startswith("色调艳丽") and words.endswith("倒着走")


def test_a_checkpoint_may_bring_its_own_negative_prompt(tmp_path):
    wan = registry.wan2_1_t2v_1_3b().transformer

    def sampling(**given):
        config = checkpoints.make_config(wan, sampling=given)
        empty = dict.fromkeys(
            ("transformer", "vae_config", "vae", "umt5_config", "text_encoder", "tokenizer")
        )
        found = checkpoints.Checkpoint(tmp_path, config, wan, scheduler={}, **empty)
        return found.sampling["negative_prompt"]

    assert sampling() == registry.WAN_NEGATIVE_PROMPT
    assert sampling(negative_prompt="") == ""
    assert sampling(negative_prompt="blurred") == "blurred"


def test_unknown_name():
    with pytest.raises(UserError, match="wan2_1_t2v_14b, wan2_1_t2v_1_3b, wan_digits"):
        registry.sizes("wan3")
