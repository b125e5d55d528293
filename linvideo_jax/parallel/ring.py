"""Ring attention (Liu et al., 2023): keys and values pass from device to device, tokens stay.

Every device attends to one block of keys while the next is on its way. Memory is that of a few
blocks, in both directions: the backward pass sends keys and values round once more, and their
gradients with them. Runs inside `jax.shard_map`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.softmax_attention import blocks

Local = Float[Array, "batch local_tokens heads head_dim"]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ring_attention(q: Local, k: Local, v: Local, axis: str, tokens: int) -> Local:
    """Softmax attention of this device's queries to the keys of all devices along mesh axis `axis`.

    tokens: how many there are in all; the last devices may hold pads, which are no keys.
    """
    return _forward(q, k, v, axis, tokens)[0]


def _forward(q, k, v, axis, tokens):
    devices = jax.lax.axis_size(axis)

    def step(carry, turn):
        block, k, v = carry
        following = _pass_on((k, v), axis)
        block = blocks.merge(block, blocks.attend(q, k, v, _num_keys(k, axis, turn, tokens)))
        return (block, *following), None

    # A block of no keys: the first merge gives it no weight.
    start = blocks.Block(
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((q.shape[0], q.shape[2], q.shape[1]), blocks.MASKED),
    )
    (block, k_last, v_last), _ = jax.lax.scan(step, (start, k, v), jnp.arange(devices - 1))
    last = blocks.attend(q, k_last, v_last, _num_keys(k, axis, devices - 1, tokens))
    block = blocks.merge(block, last)
    return block.out.astype(q.dtype), (q, k, v, block)


def _backward(axis, tokens, saved, dout):
    q, k, v, whole = saved
    devices = jax.lax.axis_size(axis)

    def step(carry, turn):
        dq, sums, k, v = carry
        following = _pass_on((k, v), axis)
        num_keys = _num_keys(k, axis, turn, tokens)
        more, *changes = blocks.gradients(q, k, v, whole, dout, num_keys)
        sums = _pass_on(jax.tree.map(jnp.add, sums, tuple(changes)), axis)
        return (dq + more, sums, *following), None

    zero = jnp.zeros(q.shape, jnp.float32)
    carry = zero, (zero, zero), k, v
    # All the way round, so that the gradients of keys and values come home.
    (dq, (dk, dv), _, _), _ = jax.lax.scan(step, carry, jnp.arange(devices))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring_attention.defvjp(_forward, _backward)


def _pass_on(tree, axis):
    devices = jax.lax.axis_size(axis)
    to = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to), tree)


def _num_keys(k: Local, axis: str, turn, tokens: int):
    """How many of the keys that are here at this turn are no pads; None if there are no pads."""
    devices, local = jax.lax.axis_size(axis), k.shape[1]
    if devices * local == tokens:
        return None
    owner = (jax.lax.axis_index(axis) - turn) % devices
    return jnp.clip(tokens - owner * local, 0, local)
