"""Hedgehog linear attention for TPUs: features live in VMEM alone, in both directions.

Forward is two passes over the tokens: `linear_attention_state` reads k and v once, `apply_state`
reads q and writes the output. Each has a backward pass of its own that computes the features
again, so that what is kept for it is the inputs and one state. The grid of every kernel is
(batch, groups of heads, tiles of tokens); sums over tokens run along the last axis in order,
which makes them the same bits each time, and the first two are parallel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels.dispatch import platform
from kernels.linear_attention import checks
from kernels.linear_attention import pallas_tpu_kernels as bodies
from kernels.linear_attention.pallas_tpu_grid import Grid, TileConfig
from kernels.linear_attention.reference import TINY
from kernels.linear_attention.types import FeatureMap, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

HEAD_DIMS = (32, 64, 128, 256)
MAX_FEATURES = 256
TILES = TileConfig()


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
    config: TileConfig = TILES,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.linear_attention`.

    Raises: NotImplementedError off TPUs, and for a dtype or size that the kernels do not take.
    """
    state = linear_attention_state(k, v, feature_map, key_lengths, config)
    return apply_state(q, state, feature_map, config)


def linear_attention_state(
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
    config: TileConfig = TILES,
) -> State:
    """See `interface.linear_attention_state`. Raises: as `linear_attention`."""
    checks.hedgehog_alone(feature_map)
    _refuse(k, feature_map.k)
    batch, keys, _, _ = k.shape
    lengths = jnp.full(batch, keys) if key_lengths is None else jnp.minimum(key_lengths, keys)
    return _state(k, v, _both_signs(feature_map.k), lengths.astype(jnp.int32), config)


def apply_state(
    q: Float[Array, "batch tokens heads head_dim"],
    state: State,
    feature_map: FeatureMap,
    config: TileConfig = TILES,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.apply_state`. Raises: as `linear_attention`."""
    checks.hedgehog_alone(feature_map)
    _refuse(q, feature_map.q)
    return _apply(q, state, _both_signs(feature_map.q), config)


def _refuse(x: Float[Array, "batch tokens heads head_dim"], weight: Array) -> None:
    if platform() != "tpu":
        raise NotImplementedError(f"needs a TPU, this is {platform()}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs bfloat16 or float32, got {x.dtype}")
    if x.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"needs head_dim in {HEAD_DIMS}, got {x.shape[-1]}")
    if weight.shape[-1] > MAX_FEATURES:
        raise NotImplementedError(f"needs features up to {MAX_FEATURES}, got {weight.shape[-1]}")


def _both_signs(weight: Float[Array, "heads head_dim features"]) -> Array:
    weight = weight.astype(jnp.float32)
    return jnp.concatenate([weight, -weight], axis=-1)


# What follows takes weight as [W, -W] in float32, `[heads, head_dim, double_features]`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _state(k, v, weight, lengths, config) -> State:
    grid = Grid.of(k, config)
    kv, mass = grid.run(
        bodies.state_kernel,
        lengths,
        [grid.tokens(k), grid.tokens(v), grid.matrices(weight.astype(k.dtype))],
        [grid.new_sums(weight.shape[2], k.shape[3]), grid.new_sums(1, weight.shape[2])],
    )
    return State(kv, mass[:, :, 0])


def _state_forward(k, v, weight, lengths, config):
    return _state(k, v, weight, lengths, config), (k, v, weight, lengths)


def _state_backward(config, saved, gradient: State):
    k, v, weight, lengths = saved
    grid = Grid.of(k, config)
    dk, dv, dweight = grid.run(
        bodies.state_backward_kernel,
        lengths,
        [
            grid.tokens(k),
            grid.tokens(v),
            grid.matrices(weight.astype(k.dtype)),
            grid.sums(gradient.kv.astype(k.dtype)),
            grid.sums(gradient.mass[:, :, None]),
        ],
        [grid.new_tokens(k.dtype), grid.new_tokens(v.dtype), grid.new_sums(*weight.shape[1:])],
    )
    return dk.reshape(k.shape), dv.reshape(v.shape), jnp.sum(dweight, axis=0), None


_state.defvjp(_state_forward, _state_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _apply(q, state: State, weight, config):
    grid = Grid.of(q, config)
    (out,) = grid.run(
        bodies.apply_kernel,
        grid.full_lengths(),
        [grid.tokens(q), *_operands_of_apply(grid, q, state, weight)],
        [grid.new_tokens(q.dtype)],
    )
    return out.reshape(q.shape)


def _apply_forward(q, state, weight, config):
    return _apply(q, state, weight, config), (q, state, weight)


def _apply_backward(config, saved, dout):
    q, state, weight = saved
    grid = Grid.of(q, config)
    dq, dweight, dkv, dmass = grid.run(
        bodies.apply_backward_kernel,
        grid.full_lengths(),
        [grid.tokens(q), grid.tokens(dout), *_operands_of_apply(grid, q, state, weight)],
        [
            grid.new_tokens(q.dtype),
            grid.new_sums(*weight.shape[1:]),
            grid.new_sums(weight.shape[2], q.shape[3]),
            grid.new_sums(1, weight.shape[2]),
        ],
    )
    return dq.reshape(q.shape), State(dkv, dmass[:, :, 0]), jnp.sum(dweight, axis=0)


_apply.defvjp(_apply_forward, _apply_backward)


def _operands_of_apply(grid: Grid, q, state: State, weight):
    """Weight, mean value of each feature (bounded by the values', unlike their sum), and mass."""
    mass = state.mass[:, :, None]
    mean = state.kv / jnp.maximum(state.mass, TINY)[..., None]
    return grid.matrices(weight.astype(q.dtype)), grid.sums(mean.astype(q.dtype)), grid.sums(mass)
