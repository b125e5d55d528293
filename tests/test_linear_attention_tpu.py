"""The TPU kernels, interpreted on the CPU with race detection, and compiled ahead of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from kernels.ahead_of_time import compile_for_tpu
from kernels.dispatch import compiling_for
from kernels.linear_attention import (
    FeatureMap,
    State,
    apply_state,
    combine_states,
    linear_attention,
    linear_attention_state,
    pallas_tpu,
    reference,
)

TILES = pallas_tpu.TileConfig(tile=48, chunk=16)
FORWARD = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}
GRADIENT = {jnp.float32: 1e-4, jnp.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreted():
    """Two cores, each memory location watched; a race fails the test that had it."""
    params = pltpu.InterpretParams(detect_races=True)
    with compiling_for("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


def with_gradients(function):
    """(out, dq, dk, dv, dW_q, dW_k) of function(q, k, v, feature_map) for a cotangent."""

    def run(q, k, v, feature_map, cotangent):
        out, pull = jax.vjp(function, q, k, v, feature_map)
        dq, dk, dv, maps = pull(cotangent.astype(out.dtype))
        return out, dq, dk, dv, *maps

    return jax.jit(run)


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


CASES = [
    # dtype, batch, tokens, keys, heads, head_dim, features, key_lengths
    (jnp.float32, 2, 33, 70, 5, 32, 16, (50, 70)),
    (jnp.float32, 1, 16, 1, 1, 256, 128, None),
    (jnp.bfloat16, 1, 129, 127, 1, 128, 64, None),
    (jnp.bfloat16, 1, 1, 129, 3, 64, 24, None),
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case):
    *sizes, lengths = case
    given = arrays(*sizes)
    lengths = None if lengths is None else jnp.asarray(lengths)
    ours = with_gradients(lambda *args: pallas_tpu.linear_attention(*args, lengths, TILES))(*given)
    exact = in_float32(*given, lengths)
    assert [x.shape for x in ours] == [x.shape for x in exact]
    assert all(x.dtype == case[0] for x in ours[:4])
    if case[3] == 1:  # softmax over one key: the output is v, whatever q and k are
        assert all(np.abs(exact[i]).max() < 1e-4 for i in (1, 2, 4, 5))
        ours, exact = (ours[0], ours[3]), (exact[0], exact[3])
    assert_near(ours, exact, case[0])
