"""What the policies cost in memory, by the compiler for a TPU that is not there."""

import jax
import jax.numpy as jnp
import pytest

from kernels.ahead_of_time import compile_for_tpu
from linvideo_jax.models import module, remat
from linvideo_jax.models.wan import WanConfig, WanTransformer

CONFIG = WanConfig(
    num_layers=8, num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4,
    text_dim=8, freq_dim=8, ffn_dim=512,
)  # fmt: skip
TOKENS = 5 * 8 * 16


def test_the_policies_keep_less_and_less_and_offload_fills_the_hosts_memory():
    shapes = [(1, 5, 16, 32, 4), (1,), (1, 32, 8)]
    inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

    def memory(policy):
        def loss(params, x, t, text):
            model = module.bind(WanTransformer, CONFIG, params)
            return jnp.sum(model(x, t, text, None, remat=policy) ** 2)

        params = module.shapes(WanTransformer, CONFIG)
        found = compile_for_tpu(jax.grad(loss), params, *inputs, kind="v5e").memory_analysis()
        return found.peak_memory_in_bytes, found.host_temp_size_in_bytes

    device, host = zip(*map(memory, remat.POLICIES), strict=True)
    assert device[0] > 2 * device[1] > 2 * device[2] > 2 * device[3], device
    # The float32 input of every layer.
    assert host == (0, 0, 0, CONFIG.num_layers * TOKENS * CONFIG.dim * 4)


def test_unknown_names_and_what_a_cpu_lacks():
    with pytest.raises(ValueError, match="remat is 'some': one of none, products"):
        remat.rematerialised(lambda x, inputs: (x, None), "some")
    assert [name for name in remat.POLICIES if remat.available(name)] == list(remat.POLICIES[:3])
