"""Hedgehog linear attention for NVIDIA GPUs (Triton): features live in registers alone.

Forward is two passes over the tokens: `linear_attention_state` reads k and v once, `apply_state`
reads q and writes the output. Each has a backward pass of its own that computes the features
again, so that what is kept for it is the inputs and one state. A program takes one head and a span
of tokens; sums over tokens are written once a program and added up afterwards, without atomics,
which makes them the same bits each time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels.dispatch import platform
from kernels.gpu import target
from kernels.linear_attention import checks, reference
from kernels.linear_attention import pallas_gpu_kernels as bodies
from kernels.linear_attention.gpu_tiles import Layer, TileConfig, choose
from kernels.linear_attention.pallas_gpu_grid import Grid, Sum, add_up
from kernels.linear_attention.types import FeatureMap, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

HEAD_DIMS = (32, 64, 128)
# The sums of a backward pass must fit a program's registers: they are features x head_dim.
MAX_FEATURES = 64


def linear_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.linear_attention`. `config`: None for what `gpu_tiles.choose` says.

    Raises: NotImplementedError off NVIDIA GPUs, on one older than Ampere, and for a size that the
    kernels do not take.
    """
    state = linear_attention_state(k, v, feature_map, key_lengths, config)
    return apply_state(q, state, feature_map, config)


def linear_attention_state(
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
    key_lengths: Int[Array, " batch"] | None = None,
    config: TileConfig | None = None,
) -> State:
    """See `interface.linear_attention_state`. `config`, Raises: as `linear_attention`."""
    checks.hedgehog_alone(feature_map)
    config = _supported(k, feature_map.k, config)
    lengths = key_lengths
    if lengths is not None:
        lengths = jnp.minimum(lengths, k.shape[1]).astype(jnp.int32)
    return _state(k, v, feature_map.k.astype(jnp.float32), lengths, config)


def apply_state(
    q: Float[Array, "batch tokens heads head_dim"],
    state: State,
    feature_map: FeatureMap,
    config: TileConfig | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.apply_state`. `config`, Raises: as `linear_attention`."""
    checks.hedgehog_alone(feature_map)
    config = _supported(q, feature_map.q, config)
    return _apply(q, state, feature_map.q.astype(jnp.float32), config)


def _supported(
    x: Float[Array, "batch tokens heads head_dim"], weight: Array, config: TileConfig | None
) -> TileConfig:
    """The tiles to use. Raises: as `linear_attention`."""
    if platform() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {platform()}")
    gpu = target()
    if gpu.capability < 8.0:
        raise NotImplementedError(f"needs an NVIDIA GPU from Ampere on, this is {gpu.kind}")
    if x.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"needs head_dim in {HEAD_DIMS}, got {x.shape[-1]}")
    if weight.shape[-1] > MAX_FEATURES:
        raise NotImplementedError(f"needs features up to {MAX_FEATURES}, got {weight.shape[-1]}")
    config = config or choose(gpu, Layer.of(x, weight.shape[-1]))
    if config.state is None or config.apply is None:
        raise NotImplementedError(
            f"{x.dtype} of head_dim {x.shape[-1]} needs more shared memory than {gpu.kind} has"
        )
    return config


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _state(k, v, weight, lengths, config) -> State:
    grid = Grid.of(k, weight.shape[2], config.state)
    parts = grid.run(bodies.state, [k, v], weight, sums=_state_sums(grid), lengths=lengths)
    return _state_of(*add_up(parts), grid)


def _state_forward(k, v, weight, lengths, config):
    return _state(k, v, weight, lengths, config), (k, v, weight, lengths)


def _state_backward(config, saved, gradient: State):
    k, v, weight, lengths = saved
    if config.state_backward is None:
        _, pull = jax.vjp(
            lambda *args: reference.linear_attention_state(*args, lengths), k, v, _maps(weight)
        )
        dk, dv, maps = pull(gradient)
        return dk, dv, maps.k, None
    grid = Grid.of(k, weight.shape[2], config.state_backward)
    # Triton keeps an operand twice if it is used both ways round and was rounded in the kernel.
    dk, dv, dweight = grid.run(
        bodies.state_backward,
        [k, v],
        weight.astype(k.dtype),
        gradient._replace(kv=gradient.kv.astype(bodies.gradient_dtype(k.dtype))),
        made=[grid.new_tokens(k.dtype), grid.new_tokens(v.dtype)],
        sums=[_weight_sum(grid)],
        lengths=lengths,
    )
    (dweight,) = add_up([_batch_as_spans(dweight)])
    return dk, dv, _dweight_of(dweight, grid), None


_state.defvjp(_state_forward, _state_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _apply(q, state: State, weight, config):
    grid = Grid.of(q, weight.shape[2], config.apply)
    (out,) = grid.run(bodies.apply, [q], weight, state, made=[grid.new_tokens(q.dtype)])
    return out


def _apply_forward(q, state, weight, config):
    return _apply(q, state, weight, config), (q, state, weight)


def _apply_backward(config, saved, dout):
    q, state, weight = saved
    if config.query_backward is None or config.apply_backward is None:
        dq, state, maps = jax.vjp(reference.apply_state, q, state, _maps(weight))[1](dout)
        return dq, state, maps.q
    grid = Grid.of(q, weight.shape[2], config.query_backward)
    dq, inverse, dlog, dweight = grid.run(
        bodies.query_backward,
        [q, dout],
        weight.astype(q.dtype),
        state,
        made=[grid.new_tokens(q.dtype), grid.new_numbers(), grid.new_numbers()],
        sums=[_weight_sum(grid)],
    )
    parts = Grid.of(q, weight.shape[2], config.apply_backward).run(
        bodies.apply_backward, [q, dout, inverse, dlog], weight, sums=_state_sums(grid)
    )
    kv, mass, dweight = add_up([*parts, _batch_as_spans(dweight)])
    return dq, _state_of(kv, mass, grid), _dweight_of(dweight, grid)


_apply.defvjp(_apply_forward, _apply_backward)


def _maps(weight) -> FeatureMap:
    """For a function of the reference that uses one of the two."""
    return FeatureMap(weight, weight)


def _state_sums(grid: Grid) -> list[Sum]:
    """A state as the kernels add it up: kv and mass, each of both signs."""
    return [Sum(2, (grid.features, grid.head_dim)), Sum(2, (grid.features,), bodies.COLUMNS)]


def _weight_sum(grid: Grid) -> Sum:
    return Sum(1, (grid.head_dim, grid.features))


def _state_of(kv, mass, grid: Grid) -> State:
    """The state from its sums, without what fills up the features."""
    return State(
        *(
            x[:, :, :, : grid.used].reshape(*x.shape[:2], 2 * grid.used, *x.shape[4:])
            for x in (kv, mass)
        )
    )


def _batch_as_spans(parts) -> Array:
    """Parts of a sum that batch entries share."""
    return parts.reshape(1, -1, *parts.shape[2:])


def _dweight_of(total, grid: Grid) -> Array:
    return total[0, :, 0, :, : grid.used]
