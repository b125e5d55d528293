"""The TPU kernels, interpreted on the CPU with race detection, and compiled ahead of time."""

import contextlib
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    arrays,
    assert_gradients_match_differences,
    assert_hard_inputs_are_right,
    assert_near,
    assert_one_token_is_right,
    in_float32,
    relative_error,
    split,
    with_gradients,
)
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels.ahead_of_time import VMEM_LIMIT, compile_for_tpu, kernel_vmem
from kernels.dispatch import compiling_for
from kernels.linear_attention import (
    FeatureMap,
    State,
    apply_state,
    linear_attention,
    linear_attention_state,
    pallas_tpu,
)

# Several tiles of several chunks, the last of each in part past the end.
TILES = pallas_tpu.TileConfig(tile=64, chunk=32)


@contextlib.contextmanager
def interpreted(**params):
    """TPU kernels traced inside run on the CPU; a race between their reads and writes fails."""
    params = pltpu.InterpretParams(detect_races=True, **params)
    with compiling_for("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield
        assert not interpret_pallas_call.races.races_found


@pytest.fixture
def on_tpu():
    with interpreted():
        yield


@functools.cache
def kernels_with_gradients():
    return with_gradients(lambda *args: pallas_tpu.linear_attention(*args, config=TILES))


@pytest.mark.usefixtures("on_tpu")
def test_kernels_agree_with_the_reference():
    """A group of heads that is half empty, a length for each batch entry, 2 x 24 features."""
    given = arrays(jnp.float32, 2, 33, 70, 3, 64, 24)
    lengths = jnp.asarray((50, 70))
    ours = with_gradients(lambda *args: pallas_tpu.linear_attention(*args, lengths, TILES))(*given)
    exact = in_float32(*given, lengths)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in exact]
    assert_near(ours, exact, jnp.float32)
    assert not any(x[0, 50:].any() for x in ours[2:4])


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hard_inputs(dtype):
    assert_hard_inputs_are_right(kernels_with_gradients(), dtype)


@pytest.mark.usefixtures("on_tpu")
def test_one_token():
    assert_one_token_is_right(kernels_with_gradients(), 256, 128)


@pytest.mark.usefixtures("on_tpu")
def test_gradients_match_differences():
    assert_gradients_match_differences(
        jax.jit(lambda *args: pallas_tpu.linear_attention(*args, config=TILES))
    )


def test_the_same_bits_for_any_order_of_the_parallel_axes():
    _, k, v, feature_map, _ = arrays(jnp.bfloat16, 2, 20, 20, 2, 128, 64)
    states = []
    for seed in (0, 1):
        with interpreted(random_seed=seed):
            states.append(pallas_tpu.linear_attention_state(k, v, feature_map))
    np.testing.assert_array_equal(states[0].kv, states[1].kv)
    np.testing.assert_array_equal(states[0].mass, states[1].mass)


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu"])
def test_states_of_any_split_combine_to_the_whole(implementation):
    """Values and gradients, each set of keys by itself."""
    given = arrays(jnp.float32, 1, 20, 50, 2, 32, 16)
    ours = with_gradients(split(implementation))(*given)
    assert_near(ours, in_float32(*given), jnp.float32)


def test_float16_is_the_references_and_stays_finite():
    q, k, v, feature_map, cotangent = arrays(jnp.float16, 1, 50, 300, 2, 64, 32)
    given = (q, 1e4 * jnp.sign(k), 1e4 * jnp.sign(v), feature_map, cotangent)
    with compiling_for("tpu"):
        ours = with_gradients(lambda *args: linear_attention(*args))(*given)
    assert ours[0].dtype == jnp.float16
    assert all(np.isfinite(x).all() for x in ours)
    assert relative_error(ours[0], in_float32(*given)[0]) < 1e-3


def test_no_key_gives_zero():
    q, k, v, feature_map, cotangent = arrays(jnp.float32, 1, 16, 16, 1, 32, 16)
    for name in ("reference", "pallas_tpu"):
        with interpreted():
            results = with_gradients(
                lambda *args, name=name: linear_attention(
                    *args, key_lengths=jnp.zeros(1, jnp.int32), implementation=name
                )
            )(q, k, v, feature_map, cotangent)
        assert not any(x.any() for x in results)


@pytest.mark.parametrize("sizes", [(32_760, 12), (75_600, 40)])
def test_compiled_for_v5p_features_never_reach_main_memory(sizes):
    """Both of Wan2.1's sizes, forward and backward, by the real compiler."""
    tokens, heads = sizes
    flat = jax.ShapeDtypeStruct((1, tokens, heads * 128), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((heads, 128, 64), jnp.float32)

    def layer(q, k, v, feature_map):
        q, k, v = (x.reshape(1, tokens, heads, 128) for x in (q, k, v))
        return linear_attention(q, k, v, feature_map).reshape(flat.shape)

    arguments = (flat, flat, flat, FeatureMap(weight, weight), flat)
    compiled = compile_for_tpu(with_gradients(layer), *arguments, kind="v5p")
    features_of_one_head = tokens * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < features_of_one_head
    used = kernel_vmem(compiled)
    assert len(used) == 4 and max(used.values()) <= VMEM_LIMIT


def test_off_a_tpu_the_kernels_refuse_and_the_reference_serves():
    q, k, v, feature_map, _ = arrays(jnp.float32, 1, 4, 4, 1, 32, 16)
    with pytest.raises(NotImplementedError, match="pallas_tpu: needs a TPU, this is cpu"):
        linear_attention(q, k, v, feature_map, implementation="pallas_tpu")
    exact = linear_attention(q, k, v, feature_map, implementation="reference")
    np.testing.assert_array_equal(linear_attention(q, k, v, feature_map), exact)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((jnp.float16, 1, 4, 4, 1, 32, 16), "needs bfloat16 or float32, got float16"),
        ((jnp.float32, 1, 4, 4, 1, 48, 16), r"needs head_dim in \(32, 64, 128, 256\), got 48"),
        ((jnp.float32, 1, 4, 4, 1, 32, 300), "needs features up to 256, got 300"),
    ],
)
def test_kernels_say_what_they_do_not_take(sizes, reason):
    q, k, v, feature_map, _ = arrays(*sizes)
    with compiling_for("tpu"), pytest.raises(NotImplementedError, match=reason):
        linear_attention(q, k, v, feature_map, implementation="pallas_tpu")


def test_kernels_need_jax_alone():
    """No other package of the project's; jaxtyping is for those who read the annotations."""
    program = """
import sys
sys.modules.update(dict.fromkeys(["jaxtyping", "flax", "einops", "chex"]))
from kernels.linear_attention import linear_attention
from kernels.softmax_attention import softmax_attention
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_inputs_that_do_not_fit_together_are_named():
    q, k, v, feature_map, _ = arrays(jnp.float32, 2, 4, 5, 3, 32, 16)
    state = linear_attention_state(k, v, feature_map)
    wrong = [
        (lambda: linear_attention(q[0], k, v, feature_map), r"q is float32\[4, 3, 32\]: needs"),
        (lambda: linear_attention(q, k, v[:, :4], feature_map), r"k is .* and v .*\[2, 4, 3, 32\]"),
        (lambda: linear_attention(q[:, :, :2], k, v, feature_map), r"feature_map.q is .*\[2, 32"),
        (lambda: linear_attention(q[:1], k, v, feature_map), "need the same batch, heads"),
        (lambda: linear_attention(q.astype(jnp.bfloat16), k, v, feature_map), "and dtype"),
        (lambda: linear_attention(q.astype(int), k, v, feature_map), "needs one of bfloat16"),
        (lambda: linear_attention(q[:, :0], k, v, feature_map), "none zero"),
        (
            lambda: linear_attention(q, k, v, feature_map, key_lengths=jnp.ones(3, int)),
            r"key_lengths is int32\[3\]: needs integers \[2\]",
        ),
        (lambda: apply_state(q[:1], state, feature_map), "state has kv"),
        (lambda: apply_state(q, State(state.kv, state.mass.astype(int)), feature_map), "float32"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    for sizes, message in (({"chunk": 8}, "chunk of 8"), ({"tile": 100}, "tile of 100")):
        with pytest.raises(ValueError, match=message):
            pallas_tpu.TileConfig(**sizes)
