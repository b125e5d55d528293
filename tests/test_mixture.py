"""The mixed attention: value, gradients, and what is kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from kernels.mixture import mix

SHAPE = (2, 5, 3, 4)


def plain(r, softmax, linear):
    mixed = r * softmax.astype(jnp.float32) + (1 - r) * linear.astype(jnp.float32)
    return mixed.astype(softmax.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(dtype):
    softmax, linear, dout = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), dtype)
    r = jnp.float32(0.3)
    results = []
    for function in (mix, plain):
        out, pull = jax.vjp(function, r, softmax, linear)
        results.append((out, *pull(dout)))
    for ours, exact in zip(*results, strict=True):
        assert (ours.shape, ours.dtype) == (exact.shape, exact.dtype)
        np.testing.assert_allclose(
            ours.astype(jnp.float32), exact.astype(jnp.float32), rtol=1e-5, atol=1e-5
        )


def test_what_is_kept_is_not_widened():
    def kept_bytes(function):
        def loss(r, x, y):
            # The attentions are results, not arguments, which would be kept anyway.
            return jnp.sum(function(r, jnp.sin(x), jnp.cos(y)).astype(jnp.float32))

        x = jnp.ones(SHAPE, jnp.bfloat16)
        kept = saved_residuals(loss, jnp.float32(0.3), x, x)
        sizes = [a.size * a.dtype.itemsize for a, source in kept if "argument" not in source]
        return sum(sizes) / x.size

    # Two derivatives of 2 bytes, and the two attentions.
    assert kept_bytes(mix) <= 4 + 4 + 0.1
    assert kept_bytes(plain) >= 4 + 8
