"""Bodies of the GPU kernels: each sees one tile of tokens of one head, in registers.

A body is made once a program, of what stays the same for all its tiles: `weight`, `[head_dim,
features]` in the tokens' dtype, `kv`, `[2 features, head_dim]`, of a state or its gradient, and the
pair `mass`, `[features]`, one for each sign of the logits. `features` is a power of two; columns
from `used` on fill it up, and their features are zero.

It returns a function of a tile: arrays of tokens are `[tile, head_dim]`, numbers of tokens
`[tile]`, both zero where `valid`, `[tile]`, is false. That one stores what it makes of the tile's
tokens by `store(which output, value)`, as early as it can to free registers, and returns its sums
with the tile's part added. Products take 16-bit operands as they are and float32 unrounded,
accumulate in float32, and all between them is float32. docs/kernels.md has the formulas.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear_attention.pallas_gpu_arithmetic import exp2, multiply_add
from kernels.linear_attention.reference import EPSILON, TINY

LOG2_E = 1.4426950408889634
# Columns of a sum over tokens that is taken by the matrix unit: the least of a product.
COLUMNS = 16
SIGNS = (1.0, -1.0)  # of the logits, in order


def state(weight, kv, mass, used):
    """Adds the tile's phi(k)^T v and its sum of phi(k)."""

    def tile(valid, store, tokens, sums):
        k, v = tokens
        powers, scales = _softmaxes(_dot(k, weight, 1, 0), used)
        phi = [(x * y[:, None]).astype(k.dtype) for x, y in zip(powers, scales, strict=True)]
        return _added(sums, phi, v, valid.astype(jnp.float32))

    return tile


def apply(weight, kv, mass, used):
    """Mixes the features' mean values by the tile's queries."""
    mean = _mean(kv, mass, weight.dtype)

    def tile(valid, store, tokens, sums):
        (q,) = tokens
        powers, scales = _softmaxes(_dot(q, weight, 1, 0), used)
        shares = [x * m[None, :] for x, m in zip(powers, mass, strict=True)]
        totals = [scale * jnp.sum(x, axis=1) for x, scale in zip(shares, scales, strict=True)]
        inverse = 1 / (totals[0] + totals[1] + EPSILON)
        # Two products of one sign each: one of both takes a quarter more registers.
        parts = [
            _dot((x * (scale * inverse)[:, None]).astype(q.dtype), y, 1, 0)
            for x, scale, y in zip(shares, scales, mean, strict=True)
        ]
        store(0, parts[0] + parts[1])
        return ()

    return tile


def query_backward(weight, kv, mass, used):
    """Gradient of the tile's queries; adds that of the weight.

    Stores what `apply_backward` needs: 1 / denominator, and the gradient of its logarithm.
    """
    dtype = gradient_dtype(weight.dtype)
    kv = kv.astype(dtype)
    weight_of_gradients = weight.astype(dtype)

    def tile(valid, store, tokens, sums):
        q, dout = tokens
        (dweight,) = sums
        powers, scales = _softmaxes(_dot(q, weight, 1, 0), used)
        totals = [
            scale * jnp.sum(x * m[None, :], axis=1)
            for x, m, scale in zip(powers, mass, scales, strict=True)
        ]
        inverse = 1 / (totals[0] + totals[1] + EPSILON)
        store(1, inverse)
        # A share is power x mass x factor. The shares of both signs sum to one.
        factors, dout = [x * inverse for x in scales], dout.astype(dtype)
        dz, expected = 0.0, []
        products = jnp.split(_dot(dout, kv, 1, 1), 2, axis=1)
        for i, sign in enumerate(SIGNS):
            product = powers[i] * products[i]
            expected.append(factors[i] * jnp.sum(product, axis=1))
            dz = multiply_add(product, (sign * factors[i])[:, None], dz)
        both = expected[0] + expected[1]
        store(2, -both)
        for i, sign in enumerate(SIGNS):
            # Sum over this sign's features of share x (its gradient - the expected one).
            surplus = expected[i] - both * totals[i] * inverse
            slope, offset = -sign * factors[i] * both, -sign * scales[i] * surplus
            change = multiply_add(mass[i][None, :], slope[:, None], offset[:, None])
            dz = multiply_add(powers[i], change, dz)
        dz = dz.astype(dtype)
        store(0, _dot(dz, weight_of_gradients, 1, 1))
        return (dweight + _dot(q.astype(dtype), dz, 0, 0),)

    return tile


def apply_backward(weight, kv, mass, used):
    """Adds the gradient of the state: `state` with weights 1 / denominator."""
    dtype = gradient_dtype(weight.dtype)

    def tile(valid, store, tokens, sums):
        q, dout, inverse, dlog = tokens
        powers, scales = _softmaxes(_dot(q, weight, 1, 0), used)
        phi = [
            (x * (scale * inverse)[:, None]).astype(dtype)
            for x, scale in zip(powers, scales, strict=True)
        ]
        return _added(sums, phi, dout.astype(dtype), dlog)

    return tile


def state_backward(weight, kv, mass, used):
    """Gradients of the tile's keys and values; adds that of the weight. kv, mass: gradients."""
    dtype = gradient_dtype(weight.dtype)
    dkv = kv.astype(dtype)
    weight_of_gradients = weight.astype(dtype)

    def tile(valid, store, tokens, sums):
        k, v = tokens
        (dweight,) = sums
        powers, scales = _softmaxes(_dot(k, weight, 1, 0), used)
        dphi = jnp.split(_dot(v.astype(dtype), dkv, 1, 1), 2, axis=1)
        both, dz = [], 0.0
        for i, sign in enumerate(SIGNS):
            phi = powers[i] * jnp.where(valid, scales[i], 0)[:, None]
            product = phi * (dphi[i] + mass[i][None, :])
            total = jnp.sum(product, axis=1)
            both.append(phi)
            dz = multiply_add(phi, (-sign * total)[:, None], dz + sign * product)
        dz = dz.astype(dtype)
        store(1, _dot(_joined(both, dtype), dkv, 1, 0))
        store(0, _dot(dz, weight_of_gradients, 1, 1))
        return (dweight + _dot(k.astype(dtype), dz, 0, 0),)

    return tile


def gradient_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Of the operands of products with gradients: those leave the range of float16."""
    return jnp.bfloat16 if dtype == jnp.float16 else dtype


def _softmaxes(z, used):
    """softmax(z) and softmax(-z) over the first `used` columns: powers, and what scales each row.

    The greatest power of a row is one.
    """
    high = low = z
    if used < z.shape[1]:
        fits = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) < used
        high, low = jnp.where(fits, z, -jnp.inf), jnp.where(fits, z, jnp.inf)
    top, bottom = jnp.max(high, axis=1) * -LOG2_E, jnp.min(low, axis=1) * LOG2_E
    up = exp2(multiply_add(high, jnp.float32(LOG2_E), top[:, None]))
    down = exp2(multiply_add(low, jnp.float32(-LOG2_E), bottom[:, None]))
    return [up, down], [1 / jnp.sum(x, axis=1) for x in (up, down)]


def _mean(kv, mass, dtype):
    """Mean value of each feature: bounded by the values', unlike their sum."""
    return [
        (x * (1 / jnp.maximum(m, TINY))[:, None]).astype(dtype)
        for x, m in zip(jnp.split(kv, 2, axis=0), mass, strict=True)
    ]


def _joined(pair, dtype):
    """Both signs' `[rows, features]` side by side, by what Triton does in registers."""
    rows, features = pair[0].shape
    last = jnp.concatenate([x.astype(dtype)[:, :, None] for x in pair], axis=2)
    return last.transpose(0, 2, 1).reshape(rows, 2 * features)


def _added(sums, phi, values, numbers):
    """Sums of phi^T values and, in all COLUMNS alike, of phi^T numbers."""
    kv, mass = sums[:2], sums[2:]
    columns = jnp.broadcast_to(numbers[:, None], (values.shape[0], COLUMNS)).astype(values.dtype)
    kv = [total + _dot(x, values, 0, 0) for total, x in zip(kv, phi, strict=True)]
    mass = [total + _dot(x, columns, 0, 0) for total, x in zip(mass, phi, strict=True)]
    return *kv, *mass


def _dot(left, right, left_axis, right_axis):
    """Product of two matrices over one axis of each, float32."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
