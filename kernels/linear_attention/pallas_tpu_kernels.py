"""Bodies of the TPU kernels: each sees one chunk of tokens of a few heads, all in VMEM.

Arrays of tokens are refs of `[chunk, heads * head_dim]`, others `[heads, rows, columns]`; `weight`
is [W, -W] of each head, so that one product gives both signs; `mass` and `dmass` have one row.
Products take operands of the inputs' dtype and accumulate in float32, as everything between them
is. Where `valid` is false an array of tokens may hold anything. docs/kernels.md has the formulas.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.linear_attention.reference import EPSILON


def state_kernel(valid, k, v, weight, kv, mass):
    """Adds the chunk's phi(k)^T v and its sum of phi(k) to `kv` and `mass`."""
    for head, lanes in _heads(k, weight):
        phi = _features(k[:, lanes], weight[head])
        phi = jnp.where(valid, phi, 0).astype(k.dtype)
        values = jnp.where(valid, v[:, lanes], 0)
        kv[head] += _dot(phi, values, 0, 0)
        mass[head] += _sum_rows(phi.astype(jnp.float32))


def apply_kernel(valid, q, weight, mean, mass, out):
    """Mixes the features' mean values by the chunk's queries."""
    for head, lanes in _heads(q, weight):
        share, _ = _shares(_features(q[:, lanes], weight[head]), mass[head])
        out[:, lanes] = _dot(share.astype(q.dtype), mean[head], 1, 0).astype(out.dtype)


def apply_backward_kernel(valid, q, dout, weight, mean, mass, dq, dweight, dkv, dmass):
    """Gradient of the chunk's queries; adds those of the weight and of the state."""
    for head, lanes in _heads(q, weight):
        queries = jnp.where(valid, q[:, lanes], 0)
        dout_head = jnp.where(valid, dout[:, lanes], 0)
        phi = _features(queries, weight[head])
        share, inverse = _shares(phi, mass[head])
        dshare = _dot(dout_head, mean[head], 1, 1)
        expected = jnp.sum(share * dshare, axis=1, keepdims=True)
        dz = _features_backward(phi, mass[head] * inverse * (dshare - expected))
        dz = dz.astype(q.dtype)
        dq[:, lanes] = _dot(dz, weight[head], 1, 1).astype(dq.dtype)
        dweight[head] += _dot(queries, dz, 0, 0)
        scaled = (dout_head.astype(jnp.float32) * inverse).astype(q.dtype)
        dkv[head] += _dot(phi.astype(q.dtype), scaled, 0, 0)
        dmass[head] -= _sum_rows(phi * (expected * inverse))


def state_backward_kernel(valid, k, v, weight, dkv, dmass, dk, dv, dweight):
    """Gradients of the chunk's keys and values; adds that of the weight."""
    for head, lanes in _heads(k, weight):
        keys = jnp.where(valid, k[:, lanes], 0)
        values = jnp.where(valid, v[:, lanes], 0)
        phi = jnp.where(valid, _features(keys, weight[head]), 0)
        dphi = _dot(values, dkv[head], 1, 1) + dmass[head]
        dz = _features_backward(phi, dphi).astype(k.dtype)
        dk[:, lanes] = _dot(dz, weight[head], 1, 1).astype(dk.dtype)
        dv[:, lanes] = _dot(phi.astype(k.dtype), dkv[head], 1, 0).astype(dv.dtype)
        dweight[head] += _dot(keys, dz, 0, 0)


def _features(x, weight):
    """[softmax(x W), softmax(-x W)] of a head, float32."""
    z = _dot(x, weight, 1, 0)
    e = jnp.exp(z - _of_halves(jnp.max, z, -jnp.inf))
    return e * (1 / _of_halves(jnp.sum, e, 0.0))


def _features_backward(phi, dphi):
    """Gradient of the logits [x W, -x W] from that of their softmaxes."""
    product = phi * dphi
    return product - phi * _of_halves(jnp.sum, product, 0.0)


def _of_halves(reduce, x, neutral):
    """Each half of a row reduced by itself, spread over that half.

    Masks instead of slices: half a row may end inside a vector register.
    """
    first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2
    left = reduce(jnp.where(first, x, neutral), axis=1, keepdims=True)
    right = reduce(jnp.where(first, neutral, x), axis=1, keepdims=True)
    return jnp.where(first, left, right)


def _shares(phi, mass):
    """What share of a query's output each feature has, and 1 / denominator."""
    weights = phi * mass
    inverse = 1 / (jnp.sum(weights, axis=1, keepdims=True) + EPSILON)
    return weights * inverse, inverse


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


def _sum_rows(x):
    return jnp.sum(x, axis=0, keepdims=True)


def _heads(x, weight):
    """Index of each head of the block, and where in the lanes of x it is."""
    heads, head_dim, _ = weight.shape
    return [(head, pl.ds(head * head_dim, head_dim)) for head in range(heads)]
