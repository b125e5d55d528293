"""Bodies of the GPU kernels: each sees one tile of tokens of one head, in registers.

Arrays of tokens are `[tile, head_dim]`, numbers of tokens `[tile]`, both zero where `valid` is
false; `weight` is `[head_dim, features]`; `mass` and `dmass` are pairs of `[features]`, `mean` and
`dkv` pairs of `[features, head_dim]`, one for each sign of the logits. `features` is a power of
two; columns from `used` on fill it up, and their features are zero. Products take 16-bit operands
as they are and float32 unrounded, accumulate in float32, and all between them is float32.
A body stores what it makes of the tile's tokens by `store(which output, value)`, as early as it
can to free registers, and returns its sums with the tile's part added. docs/kernels.md has the
formulas.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear_attention.reference import EPSILON

LOG2_E = 1.4426950408889634
# Columns of a sum over tokens that is taken by the matrix unit: the least of a product.
COLUMNS = 16


def state(valid, store, tokens, constants, sums, used):
    """Adds the tile's phi(k)^T v and its sum of phi(k)."""
    k, v = tokens
    (weight,) = constants
    features = _features(_dot(k, weight, 1, 0), used)
    phi = [jnp.where(valid, x, 0).astype(k.dtype) for x in features]
    return _added(sums, phi, v, jnp.ones(k.shape[0], jnp.float32))


def apply(valid, store, tokens, constants, sums, used):
    """Mixes the features' mean values by the tile's queries."""
    (q,) = tokens
    weight, *mean_and_mass = constants
    mean, mass = mean_and_mass[:2], mean_and_mass[2:]
    features = _features(_dot(q, weight, 1, 0), used)
    inverse = (1 / _denominator(features, mass))[:, None]
    shares = [x * (m[None, :] * inverse) for x, m in zip(features, mass, strict=True)]
    parts = [_dot(x.astype(q.dtype), y, 1, 0) for x, y in zip(shares, mean, strict=True)]
    store(0, parts[0] + parts[1])
    return ()


def query_backward(valid, store, tokens, constants, sums, used):
    """Gradient of the tile's queries; adds that of the weight.

    Stores what `apply_backward` needs: 1 / denominator, and the gradient of its logarithm.
    """
    q, dout = tokens
    weight, *mean_and_mass = constants
    mean, mass = mean_and_mass[:2], mean_and_mass[2:]
    (dweight,) = sums
    dtype = gradient_dtype(q.dtype)
    features = _features(_dot(q, weight, 1, 0), used)
    denominator = _denominator(features, mass)
    inverse = 1 / denominator
    store(1, inverse)
    # Rounded here, so that they take half the registers until the end.
    phi = [(x * inverse[:, None]).astype(dtype) for x in features]
    weights = [x.astype(jnp.float32) * m[None, :] for x, m in zip(phi, mass, strict=True)]
    dshares = [_dot(dout, y, 1, 1) for y in mean]
    expected = sum(jnp.sum(x * y, axis=1) for x, y in zip(weights, dshares, strict=True))
    store(2, -expected)
    # phi times its gradient.
    products = [x * (y - expected[:, None]) for x, y in zip(weights, dshares, strict=True)]
    up, down = (
        p - x.astype(jnp.float32) * (jnp.sum(p, axis=1) * denominator)[:, None]
        for x, p in zip(phi, products, strict=True)
    )
    dz = (up - down).astype(dtype)
    store(0, _dot(dz, weight.astype(dtype), 1, 1))
    return (dweight + _dot(q.astype(dtype), dz, 0, 0),)


def apply_backward(valid, store, tokens, constants, sums, used):
    """Adds the gradient of the state: `state` with weights 1 / denominator."""
    q, dout, inverse, dlog = tokens
    (weight,) = constants
    dtype = gradient_dtype(q.dtype)
    features = _features(_dot(q, weight, 1, 0), used)
    phi = [(x * inverse[:, None]).astype(dtype) for x in features]
    return _added(sums, phi, dout.astype(dtype), dlog)


def state_backward(valid, store, tokens, constants, sums, used):
    """Gradients of the tile's keys and values; adds that of the weight."""
    k, v = tokens
    weight, *dkv_and_dmass = constants
    dkv, dmass = dkv_and_dmass[:2], dkv_and_dmass[2:]
    (dweight,) = sums
    dtype = gradient_dtype(k.dtype)
    features = _features(_dot(k, weight, 1, 0), used)
    phi = [jnp.where(valid, x, 0).astype(dtype) for x in features]
    values = v.astype(dtype)
    dz = []
    for x, dy, dm in zip(phi, dkv, dmass, strict=True):
        wide = x.astype(jnp.float32)
        product = wide * (_dot(values, dy, 1, 1) + dm[None, :])
        dz.append(product - wide * jnp.sum(product, axis=1)[:, None])
    dz = (dz[0] - dz[1]).astype(dtype)
    dv = [_dot(x, dy, 1, 0) for x, dy in zip(phi, dkv, strict=True)]
    store(1, dv[0] + dv[1])
    store(0, _dot(dz, weight.astype(dtype), 1, 1))
    return (dweight + _dot(k.astype(dtype), dz, 0, 0),)


def gradient_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Of the operands of products with gradients: those leave the range of float16."""
    return jnp.bfloat16 if dtype == jnp.float16 else dtype


def _features(z, used):
    """softmax(z) and softmax(-z), over the first `used` columns."""
    high = low = z
    if used < z.shape[1]:
        fits = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) < used
        high, low = jnp.where(fits, z, -jnp.inf), jnp.where(fits, z, jnp.inf)
    top, bottom = jnp.max(high, axis=1) * LOG2_E, jnp.min(low, axis=1) * LOG2_E
    up = jnp.exp2(high * LOG2_E - top[:, None])
    down = jnp.exp2(bottom[:, None] - low * LOG2_E)
    return [x * (1 / jnp.sum(x, axis=1))[:, None] for x in (up, down)]


def _denominator(features, mass):
    parts = (jnp.sum(x * m[None, :], axis=1) for x, m in zip(features, mass, strict=True))
    return sum(parts) + EPSILON


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
