"""What the tests of every implementation of linear attention share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from kernels.linear_attention import (
    FeatureMap,
    apply_state,
    combine_states,
    linear_attention_state,
    reference,
)

# Relative L2 errors, of values and of gradients, against the reference in float32.
FORWARD = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3, jnp.float16: 1e-3}
GRADIENT = {jnp.float32: 1e-4, jnp.bfloat16: 1e-2, jnp.float16: 1e-2}


def with_gradients(function, **options):
    """(out, dq, dk, dv, dW_q, dW_k) of function(q, k, v, feature_map) for a cotangent.

    `options` are jit's.
    """

    def run(q, k, v, feature_map, cotangent):
        out, pull = jax.vjp(function, q, k, v, feature_map)
        dq, dk, dv, maps = pull(cotangent.astype(out.dtype))
        return out, dq, dk, dv, maps.q, maps.k

    return jax.jit(run, **options)


def arrays(dtype, batch, tokens, keys, heads, head_dim, features, scale=1.0):
    """q, k, v, feature_map with logits of deviation `scale`, cotangent; all rounded to dtype."""
    rng = np.random.default_rng(0)
    q, cotangent = rng.normal(size=(2, batch, tokens, heads, head_dim))
    k, v = rng.normal(size=(2, batch, keys, heads, head_dim))
    maps = rng.normal(size=(2, heads, head_dim, features)) * scale * head_dim**-0.5
    q, k, v, maps, cotangent = (jnp.asarray(x, dtype) for x in (q, k, v, maps, cotangent))
    return q, k, v, FeatureMap(*maps.astype(jnp.float32)), cotangent


def in_float32(q, k, v, feature_map, cotangent, key_lengths=None):
    """The reference, computed in float32."""
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    function = with_gradients(lambda *args: reference.linear_attention(*args, key_lengths))
    return function(*wide, feature_map, cotangent)


def relative_error(ours, exact):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def assert_near(ours, exact, dtype, slack=1):
    errors = [relative_error(*pair) for pair in zip(ours, exact, strict=True)]
    assert errors[0] <= slack * FORWARD[dtype], errors
    assert max(errors[1:]) <= slack * GRADIENT[dtype], errors


HARD = (1, 129, 127, 1, 128, 64)


def assert_hard_inputs_are_right(run, dtype):
    """`run` is `with_gradients` of an implementation; it sees arrays of HARD's sizes."""
    usual = arrays(dtype, *HARD)
    exact = in_float32(*usual)
    ours = run(*usual)
    assert_near(ours, exact, dtype)
    for once, again in zip(ours, run(*usual), strict=True):
        np.testing.assert_array_equal(once, again)

    sharp = arrays(dtype, *HARD, scale=8.0)
    assert_near(run(*sharp), in_float32(*sharp), dtype, slack=2)

    q, k, v, feature_map, cotangent = usual
    equal = [jnp.broadcast_to(x[:, :1], x.shape) for x in (q, k, v)]
    ours = run(*equal, feature_map, cotangent)
    # The output is v: no gradient passes q, k or the maps, and v's is the same for all keys.
    assert relative_error(ours[0], jnp.broadcast_to(v[:, :1], q.shape)) <= 2 * FORWARD[dtype]
    wanted = jnp.sum(cotangent.astype(jnp.float32), axis=1, keepdims=True) / v.shape[1]
    assert relative_error(ours[3], jnp.broadcast_to(wanted, v.shape)) <= 2 * GRADIENT[dtype]
    # In the maps' gradients the roundings of equal tokens add up instead of averaging out.
    for i, adds_up in ((1, 1), (2, 1), (4, k.shape[1] ** 0.5), (5, k.shape[1] ** 0.5)):
        limit = 2 * GRADIENT[dtype] * adds_up * np.linalg.norm(exact[i])
        assert np.linalg.norm(ours[i]) <= limit

    huge = [jnp.sign(x) * 1e4 for x in (q, k, v)]
    out, *gradients = run(*huge, feature_map, cotangent)
    assert np.abs(out.astype(jnp.float32)).max() <= 1.01e4
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in gradients)


def assert_one_token_is_right(run, head_dim, features):
    """The output is v; `run` is `with_gradients` of an implementation."""
    q, k, v, feature_map, cotangent = arrays(jnp.float32, 1, 1, 1, 1, head_dim, features)
    out, dq, dk, dv, *maps = run(q, k, v, feature_map, cotangent)
    np.testing.assert_allclose(out, v, rtol=1e-5)
    np.testing.assert_allclose(dv, cotangent, rtol=1e-5)
    assert all(np.abs(x).max() < 1e-5 for x in (dq, dk, *maps))


def assert_gradients_match_differences(function):
    """function(q, k, v, feature_map): its gradients in float32."""
    q, k, v, feature_map, _ = arrays(jnp.float32, 1, 20, 20, 1, 32, 16)
    check_grads(function, (q, k, v, feature_map), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def split(implementation):
    """Attention to keys 0 to 12 and to the others, each set by itself, by its states."""

    def function(q, k, v, feature_map):
        states = [
            linear_attention_state(k[:, a:b], v[:, a:b], feature_map, implementation=implementation)
            for a, b in ((0, 13), (13, k.shape[1]))
        ]
        state = combine_states(*states)
        return apply_state(q, state, feature_map, implementation=implementation)

    return function
