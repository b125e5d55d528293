"""The GPU kernels on a GPU, at full size; collected by name alone:

    python -m pytest tests/gpu -m gpu

compute-sanitizer, on the small cases, for reads and writes out of bounds and for races in shared
memory (XLA_PYTHON_CLIENT_ALLOCATOR=platform gives each array its own allocation, so that a read
past its end is seen):

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest tests/gpu -m gpu -k small
    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool racecheck --error-exitcode 1 \\
        python -m pytest tests/gpu -m gpu -k small
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    arrays,
    assert_gradients_match_differences,
    assert_hard_inputs_are_right,
    assert_near,
    in_float32,
    relative_error,
    split,
    with_gradients,
)

from kernels.linear_attention import FeatureMap, linear_attention
from kernels.softmax_attention import softmax_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.fixture(autouse=True, scope="module")
def exact_reference():
    """Products of float32 in the reference are TF32 by default."""
    with jax.default_matmul_precision("highest"):
        yield


def ours(**options):
    return with_gradients(
        lambda *args: linear_attention(*args, implementation="pallas_gpu", **options)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_inputs_small(dtype):
    assert_hard_inputs_are_right(ours(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(32, 16), (64, 24), (128, 64)])
def test_sizes_small(dtype, sizes):
    """Lengths, batches and heads that fill no tile."""
    given = arrays(dtype, 2, 129, 300, 3, *sizes)
    lengths = jnp.asarray((250, 300))
    # Few features average their roundings over less than the bounds were set for.
    slack = 1 if sizes[0] == 128 else 1.5
    results = ours(key_lengths=lengths)(*given)
    assert_near(results, in_float32(*given, lengths), dtype, slack)
    assert not any(x[0, 250:].any() for x in results[2:4])


def test_states_of_any_split_small():
    given = arrays(jnp.float32, 1, 20, 50, 2, 32, 16)
    assert_near(with_gradients(split("pallas_gpu"))(*given), in_float32(*given), jnp.float32)


def test_gradients_match_differences_small():
    assert_gradients_match_differences(
        jax.jit(lambda *args: linear_attention(*args, implementation="pallas_gpu"))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4097, 32_760])
def test_long_sequences(dtype, tokens):
    """Values, gradients, and the same bits twice."""
    given = arrays(dtype, 1, tokens, tokens, 2, 128, 64)
    run = ours()
    results = run(*given)
    assert_near(results, in_float32(*given), dtype)
    for once, again in zip(results, run(*given), strict=True):
        np.testing.assert_array_equal(once, again)


def test_the_14b_layer():
    """All heads of the largest size; the reference takes them a few at a time."""
    tokens, heads = 75_600, 40
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (1, tokens, heads, 128)
    q, k, v, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    maps = [jax.random.normal(key, (heads, 128, 64)) / 128**0.5 for key in keys[4:]]
    maps = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in maps]
    feature_map = FeatureMap(*maps)
    program = ours().lower(q, k, v, feature_map, cotangent).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 64 * 2**20
    results = program(q, k, v, feature_map, cotangent)
    for head in (slice(0, 2), slice(38, 40)):
        some = [x[:, :, head] for x in (q, k, v)]
        part = FeatureMap(feature_map.q[head], feature_map.k[head])
        exact = in_float32(*some, part, cotangent[:, :, head])
        here = [*(x[:, :, head] for x in results[:4]), *(x[head] for x in results[4:])]
        assert_near(here, exact, jnp.bfloat16)


def test_a_million_tokens():
    """Offsets past 32 bits of bytes."""
    q, k, v = (
        jax.random.normal(key, (1, 1_000_001, 20, 128), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    feature_map = arrays(jnp.float32, 1, 1, 1, 20, 128, 64)[3]
    out = jax.jit(lambda *args: linear_attention(*args, implementation="pallas_gpu"))(
        q, k, v, feature_map
    )
    some = [x[:, :, 18:20] for x in (k, v)]
    part = FeatureMap(feature_map.q[18:20], feature_map.k[18:20])
    last = q[:, -100:, 18:20]
    exact = jax.jit(lambda *args: linear_attention(*args, implementation="reference"))(
        last.astype(jnp.float32), *(x.astype(jnp.float32) for x in some), part
    )
    assert relative_error(out[:, -100:, 18:20].astype(jnp.float32), exact) <= 2e-3


@pytest.mark.parametrize("tokens", [4096, 4097])
@pytest.mark.parametrize("name", ["hopper", "cudnn", "tokamax"])
def test_softmax_libraries(name, tokens):
    """tokamax is optional: where it refuses, the refusal names the package."""
    q, k, v, cotangent = (
        jax.random.normal(key, (1, tokens, 2, 128), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )

    def run(names):
        def both(q, k, v):
            out, pull = jax.vjp(lambda *x: softmax_attention(*x, implementation=names), q, k, v)
            return out, *pull(cotangent.astype(out.dtype))

        return jax.jit(both)

    try:
        results = run(name)(q, k, v)
    except NotImplementedError as refusal:
        assert name != "cudnn" and "needs" in str(refusal)
        return
    exact = run("reference")(*(x.astype(jnp.float32) for x in (q, k, v)))
    errors = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
    assert max(errors) <= 1e-2, errors


def test_the_default_is_the_kernel_and_refusals_say_why():
    q, k, v, feature_map, _ = arrays(jnp.bfloat16, 1, 64, 64, 1, 32, 16)
    text = jax.jit(linear_attention).lower(q, k, v, feature_map).as_text()
    assert "xla.gpu.triton" in text
    q, k, v, feature_map, _ = arrays(jnp.bfloat16, 1, 64, 64, 1, 48, 16)
    with pytest.raises(NotImplementedError, match="needs head_dim in"):
        linear_attention(q, k, v, feature_map, implementation="pallas_gpu")
