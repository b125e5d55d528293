"""The attention functions against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear_attention import FeatureMap, linear_attention
from kernels.softmax_attention import softmax_attention

BATCH, TOKENS, KEYS, HEADS, HEAD_DIM, FEATURES = 2, 7, 5, 3, 6, 4


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, TOKENS, HEADS, HEAD_DIM))
    k, v = rng.normal(size=(2, BATCH, KEYS, HEADS, HEAD_DIM))
    maps = rng.normal(size=(2, HEADS, HEAD_DIM, FEATURES))
    return q, k, v, maps


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def loop(q, k, v, weights_of):
    """Weighted means of v; weights_of(head, query, keys, batch, token) in any scale."""
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        weights = weights_of(h, q[b, i, h], k[b, :, h], b, i)
        out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return out


def to_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("shape", [None, (BATCH, 1, 1, KEYS), (1, HEADS, TOKENS, KEYS)])
def test_softmax_attention_is_a_softmax_over_keys(arrays, shape):
    q, k, v, _ = arrays
    bias = np.random.default_rng(1).normal(size=shape or (1, 1, 1, KEYS)) * (shape is not None)
    full = np.broadcast_to(bias, (BATCH, HEADS, TOKENS, KEYS))

    def weights_of(h, query, keys, b, i):
        return softmax(keys @ query / HEAD_DIM**0.5 + full[b, h, i])

    given = None if shape is None else jnp.asarray(bias, jnp.float32)
    out = softmax_attention(*to_float32(q, k, v), bias=given)
    np.testing.assert_allclose(out, loop(q, k, v, weights_of), rtol=0, atol=1e-5)


def hedgehog_weights(maps):
    def features(x, weight):
        return np.concatenate([softmax(x @ weight), softmax(-x @ weight)])

    def weights_of(h, query, keys, b, i):
        phi_q = features(query, maps[0, h])
        return np.array([phi_q @ features(key, maps[1, h]) for key in keys])

    return weights_of


def test_linear_attention_weighs_by_products_of_features(arrays):
    q, k, v, maps = arrays
    feature_map = FeatureMap(*to_float32(*maps))
    out = linear_attention(*to_float32(q, k, v), feature_map)
    np.testing.assert_allclose(out, loop(q, k, v, hedgehog_weights(maps)), rtol=0, atol=1e-5)


def test_sums_over_many_bfloat16_keys_are_exact_enough():
    """A running sum in bfloat16 would stop at 256."""
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.normal(size=(3, 1, 4096, 1, 8)), jnp.bfloat16)
    v = jnp.abs(v)
    maps = FeatureMap(*to_float32(*0.5 * rng.normal(size=(2, 1, 8, 4))))
    out = linear_attention(q, k, v, maps)
    assert out.dtype == jnp.bfloat16
    exact = linear_attention(*to_float32(q, k, v), maps)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2e-2)


def test_gradients_of_linear_attention_match_differences(arrays):
    q, k, v, maps = arrays
    direction = np.random.default_rng(2).normal(size=q.shape)
    step = np.random.default_rng(3).normal(size=maps.shape)

    def loss(maps):
        out = linear_attention(*to_float32(q, k, v), FeatureMap(maps[0], maps[1]))
        return jnp.vdot(out, jnp.asarray(direction, jnp.float32))

    slope = np.vdot(jax.jit(jax.grad(loss))(jnp.asarray(maps, jnp.float32)), step)
    size = 1e-5
    up, down = (
        np.vdot(loop(q, k, v, hedgehog_weights(maps + sign * size * step)), direction)
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (up - down) / (2 * size), rtol=1e-3)


def test_bias_is_a_constant(arrays):
    q, k, v, _ = arrays
    bias = jnp.ones((1, 1, 1, KEYS))
    gradient = jax.grad(lambda b: softmax_attention(*to_float32(q, k, v), bias=b).sum())(bias)
    assert not gradient.any()


def test_a_named_implementation_that_refuses_says_why(arrays):
    q, k, v, maps = arrays
    with pytest.raises(NotImplementedError, match=r"cudnn: needs"):
        softmax_attention(*to_float32(q, k, v), implementation="cudnn")
    fallen_back = softmax_attention(*to_float32(q, k, v), implementation=("cudnn", "reference"))
    np.testing.assert_array_equal(fallen_back, softmax_attention(*to_float32(q, k, v)))
    with pytest.raises(ValueError, match="flash"):
        linear_attention(
            *to_float32(q, k, v), FeatureMap(*to_float32(*maps)), implementation="flash"
        )
