"""The text encoder against transformers' UMT5EncoderModel, float32, random weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.umt5 import UMT5Config, UMT5Encoder, relative_position_buckets

TINY = UMT5Config(
    vocab_size=61,
    d_model=20,
    d_kv=6,
    d_ff=36,
    num_layers=3,
    num_heads=3,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=20,
)


def transformers_model(config: UMT5Config) -> transformers.UMT5EncoderModel:
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config.to_dict())).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Away from one, zero or the common initial scale, so that no factor can hide.
            if "layer_norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            if "relative_attention_bias" in name:
                weight.add_(torch.randn_like(weight))
    return model


def our_params(model: transformers.UMT5EncoderModel) -> module.Params:
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    layers = range(model.config.num_layers)

    def stack(key, linear=True):
        per_layer = [weights[f"encoder.block.{i}.layer.{key}.weight"] for i in layers]
        return np.stack([w.T if linear else w for w in per_layer])

    bias = stack("0.SelfAttention.relative_attention_bias", linear=False)
    attention = {n: {"kernel": stack(f"0.SelfAttention.{n}")} for n in "qkvo"}
    return {
        "shared": {"embedding": weights["shared.weight"]},
        "blocks": {
            "attention_norm": {"scale": stack("0.layer_norm", linear=False)},
            "attention": attention | {"relative_attention_bias": {"embedding": bias}},
            "ffn_norm": {"scale": stack("1.layer_norm", linear=False)},
            "ffn": {n: {"kernel": stack(f"1.DenseReluDense.{n}")} for n in ("wi_0", "wi_1", "wo")},
        },
        "final_layer_norm": {"scale": weights["encoder.final_layer_norm.weight"]},
    }


def encode(params, config, ids, lengths, dtype=jnp.float32):
    def run(params, ids, lengths):
        return module.bind(UMT5Encoder, config, params)(ids, lengths, dtype=dtype)

    return np.asarray(jax.jit(run)(params, ids, lengths))


def relative_error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("tokens, lengths", [(37, (37, 1, 23)), (70, (70, 69, 5)), (1, (1, 1, 1))])
def test_equals_transformers(tokens, lengths):
    model = transformers_model(TINY)
    lengths = np.array(lengths, np.int32)
    ids = np.random.default_rng(tokens).integers(0, TINY.vocab_size, (3, tokens), np.int32)
    mask = np.arange(tokens) < lengths[:, None]
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
    theirs = theirs.numpy() * mask[..., None]
    ours = encode(our_params(model), TINY, ids, lengths)
    assert ours.dtype == np.float32
    for n, our, their in zip(lengths, ours, theirs, strict=True):
        assert relative_error(our[:n], their[:n]) < 1e-4
        assert not our[n:].any()


def test_tokens_beyond_the_length_are_not_seen():
    params = module.init(UMT5Encoder, TINY, seed=1)
    ids = np.arange(22, dtype=np.int32).reshape(2, 11)
    lengths = np.array([7, 4], np.int32)
    changed = np.where(np.arange(11) < lengths[:, None], ids, 60)
    a, b = (encode(params, TINY, x, lengths) for x in (ids, changed))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("buckets, distance", [(32, 128), (12, 20), (8, 16)])
def test_buckets_equal_transformers(buckets, distance):
    config = replace(
        TINY, relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config.to_dict()))
    attention = model.encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(512)
    theirs = attention._relative_position_bucket(positions[None, :] - positions[:, None])
    np.testing.assert_array_equal(relative_position_buckets(512, buckets, distance), theirs)


def test_initial_values_are_those_of_t5():
    config = replace(TINY, vocab_size=400, d_model=96, d_kv=16, num_heads=5, d_ff=160)
    ours = module.init(UMT5Encoder, config, seed=0)
    theirs = our_params(transformers.UMT5EncoderModel(transformers.UMT5Config(**config.to_dict())))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.map(jnp.shape, module.shapes(UMT5Encoder, config)) == jax.tree.map(
        jnp.shape, theirs
    )

    def check(path, our, their):
        tolerance = 0.2 if our.size < 1000 else 0.03
        assert our.dtype == jnp.float32, path
        assert np.std(our) == pytest.approx(np.std(their), rel=tolerance), path

    jax.tree_util.tree_map_with_path(check, ours, theirs)
    query = ours["blocks"]["attention"]["q"]["kernel"]
    assert not np.allclose(query[0], query[1]), "layers must start from different values"


def test_bfloat16_is_near_float32_and_has_gradients():
    params = module.init(UMT5Encoder, TINY, seed=2)
    ids = np.arange(18, dtype=np.int32).reshape(2, 9)
    lengths = np.array([9, 6], np.int32)
    exact = encode(params, TINY, ids, lengths)
    assert relative_error(encode(params, TINY, ids, lengths, jnp.bfloat16), exact) < 0.03

    def loss(params):
        out = module.bind(UMT5Encoder, TINY, params)(ids, lengths, dtype=jnp.bfloat16)
        return jnp.sum(out[..., :5] ** 2)

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert gradient.dtype == jnp.float32 and np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_configuration_from_a_transformers_file():
    theirs = transformers.UMT5Config(**TINY.to_dict()).to_dict()
    assert UMT5Config.from_dict(theirs | {"_name_or_path": "x"}) == TINY
    assert UMT5Config.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(UserError, match="model_type"):
        UMT5Config.from_dict({"model_type": "t5"})
    with pytest.raises(UserError, match="feed_forward_proj"):
        UMT5Config.from_dict({"feed_forward_proj": "relu"})
