"""The ablation's feature maps against their kernels, quadratic in the tokens, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear_attention import FeatureMap, linear_attention
from kernels.linear_attention.feature_maps import attend, relu, taylor
from kernels.linear_attention.reference import hedgehog

FEATURES = 4


def relu_kernel(y_q, y_k):
    return sum(np.maximum(s * y_q, 0) @ np.maximum(s * y_k, 0).T for s in (1, -1))


def taylor_kernel(y_q, y_k):
    s = y_q @ y_k.T
    return 1 + s + s**2 / 2


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 7, 3, 6))
    return q, k, v, rng.normal(size=(2, 3, 6, FEATURES))


@pytest.mark.parametrize(
    ("features", "kernel", "size"),
    [(relu, relu_kernel, 2 * FEATURES), (taylor, taylor_kernel, 1 + FEATURES + FEATURES**2)],
)
def test_products_of_features_are_the_kernel(arrays, features, kernel, size):
    q, k, v, maps = arrays
    to = [jnp.asarray(array, jnp.float32) for array in arrays]
    phi_q, phi_k = features(to[0], to[3][0]), features(to[1], to[3][1])
    assert phi_q.shape == (2, 7, 3, size)
    out = attend(phi_q, phi_k, to[2])
    for b, h in np.ndindex(2, 3):
        weights = kernel(q[b, :, h] @ maps[0, h], k[b, :, h] @ maps[1, h])
        expected = weights @ v[b, :, h] / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(out[b, :, h], expected, rtol=1e-4, atol=1e-4)


def test_attend_with_hedgehogs_features_is_linear_attention(arrays):
    q, k, v, maps = (jnp.asarray(array, jnp.float32) for array in arrays)
    ours = attend(hedgehog(q, maps[0]), hedgehog(k, maps[1]), v)
    np.testing.assert_array_equal(ours, linear_attention(q, k, v, FeatureMap(*maps)))
