"""The GPU kernels, interpreted on the CPU, and lowered for CUDA at full size.

What only a GPU can show is in tests/gpu.
"""

import functools
import json
import math
import re

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
    split,
    with_gradients,
)

from kernels.ahead_of_time import lower_for_gpu
from kernels.dispatch import compiling_for
from kernels.gpu import GPU, H100, SHARED_MEMORY
from kernels.linear_attention import FeatureMap, gpu_tiles, linear_attention, pallas_gpu
from kernels.linear_attention.gpu_tiles import KERNELS, Layer, TileConfig, Tiles
from kernels.linear_attention.pallas_gpu_arithmetic import interpreted
from kernels.linear_attention.pallas_gpu_grid import add_up

# Two programs a head, the last of which is in part or wholly past the end.
TILES = TileConfig(**dict.fromkeys(KERNELS, Tiles(32, 2, 4, 2)))
# Interpretation is slow to compile and quick to run.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
RTX_4090 = GPU("NVIDIA GeForce RTX 4090", 8.9, 128)


@pytest.fixture
def on_gpu():
    with compiling_for("gpu"), interpreted():
        yield


@functools.cache
def kernels_with_gradients():
    return with_gradients(lambda *args: pallas_gpu.linear_attention(*args, config=TILES), **QUICK)


@pytest.mark.usefixtures("on_gpu")
def test_kernels_agree_with_the_reference():
    """A length for each batch entry, one without a key and one past the end; 2 x 24 features."""
    given = arrays(jnp.float32, 3, 33, 70, 3, 64, 24)
    lengths = jnp.asarray((50, 0, 90))

    def function(*args):
        return pallas_gpu.linear_attention(*args, lengths, TILES)

    ours, exact = with_gradients(function, **QUICK)(*given), in_float32(*given, lengths)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in exact]
    assert_near(ours, exact, jnp.float32)
    assert not any(x[0, 50:].any() for x in ours[2:4])
    assert not any(x[1].any() for x in ours[:4])


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_hard_inputs(dtype):
    assert_hard_inputs_are_right(kernels_with_gradients(), dtype)


@pytest.mark.usefixtures("on_gpu")
def test_one_token():
    assert_one_token_is_right(kernels_with_gradients(), 32, 16)


@pytest.mark.usefixtures("on_gpu")
def test_gradients_match_differences():
    assert_gradients_match_differences(
        jax.jit(lambda *args: pallas_gpu.linear_attention(*args, config=TILES))
    )


@pytest.mark.usefixtures("on_gpu")
def test_states_of_any_split_combine_to_the_whole():
    given = arrays(jnp.float32, 1, 20, 50, 2, 32, 16)
    ours = with_gradients(split("pallas_gpu"), **QUICK)(*given)
    assert_near(ours, in_float32(*given), jnp.float32)


@pytest.mark.usefixtures("on_gpu")
def test_gradients_without_tiles_are_the_references():
    given = arrays(jnp.float32, 1, 33, 70, 1, 32, 16)
    forward = TileConfig(TILES.state, TILES.apply, None, None, None)
    ours = with_gradients(lambda *args: pallas_gpu.linear_attention(*args, config=forward), **QUICK)
    assert_near(ours(*given), in_float32(*given), jnp.float32)


@pytest.mark.usefixtures("on_gpu")
def test_parts_of_several_sums_are_added_up_together():
    """Neither parts nor numbers fill what is loaded at once; the batch differs."""
    rng = np.random.default_rng(0)
    parts = [
        rng.normal(size=x).astype(np.float32) for x in ((2, 11, 3, 250), (1, 17, 40), (2, 1, 7))
    ]
    for ours, given in zip(add_up(parts), parts, strict=True):
        np.testing.assert_allclose(ours, given.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(32_760, 12), (75_600, 40)])
def test_lowered_for_cuda_features_never_reach_main_memory(sizes):
    """Both of Wan2.1's sizes, forward and backward, through Pallas' lowering to Triton."""
    tokens, heads = sizes
    shape = (1, tokens, heads, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((heads, 128, 64), jnp.float32)
    program = with_gradients(linear_attention)
    text = lower_for_gpu(program, x, x, x, FeatureMap(weight, weight), x).as_text()
    names = re.findall(r'xla\.gpu\.triton.*?\\?name\\?"? = \\?"(\w+)', text)
    assert sorted(names) == sorted([*KERNELS, *["add_up"] * 3])
    found = {tuple(map(int, x.split("x")[:-1])) for x in re.findall(r"tensor<([\dx]+x)\w+>", text)}
    # Programs' parts of a state are together about as large as one head's features.
    large = {x for x in found if math.prod(x) >= 2 * tokens * 128}
    assert large == {shape}


@pytest.mark.parametrize("gpu", [GPU(f"NVIDIA {x}", x, 100) for x in SHARED_MEMORY], ids=str)
def test_default_tiles_fit_every_chip(gpu):
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in pallas_gpu.HEAD_DIMS:
            layer = Layer(dtype, head_dim, head_dim // 2, 12, 32_760)
            config = gpu_tiles.default(gpu, layer)
            for kernel in KERNELS:
                tiles = getattr(config, kernel)
                assert tiles is None or (
                    gpu_tiles.shared_memory(kernel, tiles, gpu, layer) <= gpu.shared_memory
                )
                # What is left to the reference: heads of 128 on chips with 99 KiB.
                assert tiles or (head_dim == 128 and gpu.shared_memory < 100 * 1024)


def test_stored_tiles_are_taken_where_they_are_nearest(tmp_path, monkeypatch):
    layer = Layer("bfloat16", 128, 64, 12, 32_760)
    entries = [
        gpu_tiles.entry(gpu, layer._replace(heads=heads), TileConfig(**dict.fromkeys(KERNELS, t)))
        for gpu, heads, t in (
            (H100, 12, Tiles(32, 1, 4, 1)),
            (H100, 40, Tiles(32, 2, 4, 1)),
            (RTX_4090, 12, Tiles(32, 3, 4, 1)),
        )
    ]
    (tmp_path / "tiles.json").write_text(json.dumps(entries))
    monkeypatch.setattr(gpu_tiles, "STORED", tmp_path / "tiles.json")
    gpu_tiles.stored.cache_clear()
    try:
        programs = [
            gpu_tiles.choose(H100, layer._replace(heads=heads)).state.programs for heads in (16, 64)
        ]
        assert programs == [1, 2]
        assert gpu_tiles.choose(H100._replace(kind="NVIDIA H200"), layer).state.programs == 1
        other = layer._replace(dtype="float16")
        assert gpu_tiles.choose(H100, other) == gpu_tiles.default(H100, other)
    finally:
        gpu_tiles.stored.cache_clear()


@pytest.mark.parametrize("words", [(8, 1, 4, 1), (48, 1, 4, 1), (32, 0, 4, 1), (32, 1, 3, 1)])
def test_tiles_that_cannot_be_are_refused(words):
    with pytest.raises(ValueError, match="needs"):
        Tiles(*words)


def test_off_a_gpu_the_kernels_refuse_and_the_reference_serves():
    q, k, v, feature_map, _ = arrays(jnp.float32, 1, 4, 4, 1, 32, 16)
    with pytest.raises(NotImplementedError, match="pallas_gpu: needs an NVIDIA GPU, this is cpu"):
        linear_attention(q, k, v, feature_map, implementation="pallas_gpu")
    exact = linear_attention(q, k, v, feature_map, implementation="reference")
    np.testing.assert_array_equal(linear_attention(q, k, v, feature_map), exact)


@pytest.mark.parametrize(
    ("sizes", "gpu", "reason"),
    [
        ((jnp.float32, 1, 4, 4, 1, 48, 16), H100, r"needs head_dim in \(32, 64, 128\), got 48"),
        ((jnp.float32, 1, 4, 4, 1, 32, 65), H100, "needs features up to 64, got 65"),
        ((jnp.float32, 1, 4, 4, 1, 32, 16), GPU("Tesla T4", 7.5, 40), "from Ampere on, this is"),
        ((jnp.float32, 1, 4, 4, 1, 32, 16), GPU("AMD", 0.0, 1), "needs an NVIDIA GPU"),
        ((jnp.float32, 1, 4, 4, 1, 128, 64), RTX_4090, "float32 of head_dim 128 needs more shared"),
    ],
)
def test_kernels_say_what_they_do_not_take(sizes, gpu, reason, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "target", lambda: gpu)
    q, k, v, feature_map, _ = arrays(*sizes)
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match=reason):
        linear_attention(q, k, v, feature_map, implementation="pallas_gpu")
