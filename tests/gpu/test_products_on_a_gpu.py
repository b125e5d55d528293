"""What XLA makes of matrix products on a GPU; collected by name alone, as the others here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax import compiled_programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def test_bias_and_gelu_are_part_of_the_product():
    def feed_forward(x, kernel, bias):
        return jax.nn.gelu(x @ kernel + bias, approximate=True)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((4096, 512), (512, 2048), (2048,))
    wide = [jax.random.normal(key, shape) * 0.05 for key, shape in zip(keys, shapes, strict=True)]
    inputs = [x.astype(jnp.bfloat16) for x in wide]
    program = compiled_programs.jit(feed_forward).lower(*inputs).compile()
    assert "BIAS_GELU" in program.as_text()
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(feed_forward(*(x.astype(jnp.float32) for x in inputs)))
    np.testing.assert_allclose(program(*inputs), expected, rtol=0.01, atol=1e-3)
