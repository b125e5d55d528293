"""Instructions of an NVIDIA GPU that XLA does not choose by itself.

XLA compiles Triton's kernels without joining a product and a sum into one instruction, and without
flushing the smallest numbers to zero, which makes four instructions of a power of two.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """GPU kernels traced inside are interpreted, on any platform."""
    token = interpreting.set(True)
    try:
        yield
    finally:
        interpreting.reset(token)


def exp2(x: jax.Array) -> jax.Array:
    """2^x of float32, two units in the last place off; zero below 2^-126."""
    if interpreting.get():
        return jnp.exp2(x)
    return _instruction("ex2.approx.ftz.f32", x)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x y + z of float32, rounded once."""
    if interpreting.get():
        return x * y + z
    return _instruction("fma.rn.f32", x, y, z)


def _instruction(name: str, *args: jax.Array) -> jax.Array:
    args = jnp.broadcast_arrays(*args)
    operands = ", ".join(f"${i}" for i in range(len(args) + 1))
    (result,) = plgpu.elementwise_inline_asm(
        f"{name} {operands};",
        args=args,
        constraints=",".join(["=f", *["f"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result
