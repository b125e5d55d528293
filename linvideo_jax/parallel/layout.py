"""The answers of `linvideo_jax/models/layout.py` for a mesh: batch, parameters and tokens shared.

Arrays outside the attention are shared out by constraints, and XLA's partitioner does the rest.
Attention runs inside `jax.shard_map`, where kernels see one device's arrays.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels.linear_attention import (
    FeatureMap,
    apply_state,
    linear_attention,
    linear_attention_state,
)
from kernels.softmax_attention import softmax_attention
from linvideo_jax.errors import UserError
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.ring import ring_attention

EXCHANGES = ("auto", "ulysses", "ring")

Tokens = Float[Array, "batch tokens heads head_dim"]


def choose_exchange(exchange: str, mesh: Mesh, heads: int) -> str:
    """How softmax layers exchange over the mesh's axis context: "ulysses" or "ring".

    "auto" is Ulysses where it can be: less is sent, and kernels see all keys at once. UserError if
    the heads do not divide for Ulysses.
    """
    context = mesh.shape["context"]
    if exchange not in EXCHANGES:
        raise UserError(f"mesh.exchange is {exchange!r}: choose one of {', '.join(EXCHANGES)}.")
    if exchange == "ulysses" and heads % context:
        raise UserError(
            f"Ulysses shares {heads} heads between context:{context} devices, which do not divide "
            "them: choose mesh.exchange=ring or another size of context."
        )
    if exchange == "auto":
        return "ring" if heads % context else "ulysses"
    return exchange


def layout_of(mesh: Mesh, heads: int, exchange: str = "auto") -> Any:
    """The layout to give to a model with so many heads; None, the plain one, for a single device.

    UserError as from `choose_exchange`.
    """
    exchange = choose_exchange(exchange, mesh, heads)
    return None if mesh.size == 1 else MeshLayout(mesh, exchange)


@dataclass(frozen=True)
class MeshLayout:
    """Batch over data and fsdp, tokens over context, parameters by `rules`.

    tokens: of a video; None until `for_tokens`. Its number need not divide: pads follow the tokens,
    are no keys, and their attention is zero.
    """

    mesh: Mesh
    exchange: str
    tokens: int | None = None

    def for_tokens(self, tokens: int) -> "MeshLayout":
        return MeshLayout(self.mesh, self.exchange, tokens)

    def blocks(self, batch: int) -> int:
        axes = meshes.batch_spec(self.mesh, batch) or ()
        return math.prod(self.mesh.shape[name] for name in axes)

    @property
    def _context(self) -> int:
        return self.mesh.shape["context"]

    @property
    def _pads(self) -> int:
        return -self.tokens % self._context

    def _constrained(self, x: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def enter(self, x: Array, axis: int) -> Array:
        if self._pads:
            x = jnp.pad(x, [(0, self._pads * (i == axis)) for i in range(x.ndim)])
        batch = meshes.batch_spec(self.mesh, x.shape[0])
        return self._constrained(x, *([] if axis == 0 else [batch]), "context")

    def leave(self, x: Float[Array, "batch tokens ..."]) -> Array:
        x = self._constrained(x, meshes.batch_spec(self.mesh, x.shape[0]))
        return x[:, : self.tokens]

    def layer(self, params: Any) -> Any:
        def gathered(path, x):
            spec = rules.layer_spec(rules.name_of(path), x.shape, self.mesh)
            return gather(x, NamedSharding(self.mesh, spec)) if any(spec) else x

        return jax.tree_util.tree_map_with_path(gathered, params)

    # By way of everywhere the same, here and in the gradient: the partitioner does so with small
    # arrays anyway, and warns.
    def features(self, x: Float[Array, "rows features"]) -> Array:
        spec = rules.spec("kernel", (x.shape[1], 1), self.mesh)
        return self._constrained(self._constrained(x), None, *spec[:1])

    def rows(self, x: Float[Array, "rows ..."]) -> Array:
        return self._constrained(self._constrained(x), meshes.batch_spec(self.mesh, x.shape[0]))

    def keep(self, tree: Any) -> Any:
        """A state, or gradients, as the table has them: for the results of an update."""
        return jax.lax.with_sharding_constraint(tree, rules.shardings(tree, self.mesh))

    def softmax_attention(self, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        if self._context == 1:
            local = softmax_attention
        elif self.exchange == "ring":
            local = partial(_ring, tokens=self.tokens)
        else:
            local = partial(_ulysses, tokens=self.tokens)
        return self._on_every_device(local, (q, k, v))

    def linear_attention(self, q: Tokens, k: Tokens, v: Tokens, maps: FeatureMap) -> Tokens:
        local = linear_attention
        if self._context > 1:
            local = partial(_shared_state, tokens=self.tokens)
        return self._on_every_device(local, (q, k, v), same=(maps,))

    def cross_attention(self, q: Tokens, k: Any, v: Any, bias: Any) -> Tokens:
        def local(q, k, v, *bias):
            return softmax_attention(q, k, v, bias=bias[0] if bias else None)

        return self._on_every_device(local, (q,), (k, v) if bias is None else (k, v, bias))

    def _on_every_device(self, function, of_tokens, of_batch=(), same=()) -> Tokens:
        """`function` of each device's part of the arrays.

        of_tokens: shared by batch and tokens; of_batch: by batch; same: everywhere the same.
        """
        batch = meshes.batch_spec(self.mesh, of_tokens[0].shape[0])
        tokens = PartitionSpec(batch, "context")
        specs = (
            *(tokens for _ in of_tokens),
            *(PartitionSpec(batch) for _ in of_batch),
            *(jax.tree.map(lambda _: PartitionSpec(), tree) for tree in same),
        )
        # Kernels do not say over which axes their results vary, so that is not checked.
        run = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=tokens, check_vma=False
        )
        return run(*of_tokens, *of_batch, *same)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: Array, sharding: NamedSharding) -> Array:
    """The whole of an array on every device; its gradient is summed straight into the shards.

    One axis of the mesh after the other, the innermost first, and the gradient the other way round.
    Asked for both at once, TPU's compiler (libtpu 0.0.42) makes all-reduces of whole arrays out of
    the sums into shards, and on v5p of the gathers too, which send twice as much.
    """
    for spec in _fewer_axes(sharding.spec)[1:]:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))
    return x


def _gather_forward(x, sharding):
    return gather(x, sharding), None


def _gather_backward(sharding, _, gradient):
    for spec in reversed(_fewer_axes(sharding.spec)[:-1]):
        gradient = jax.lax.with_sharding_constraint(gradient, NamedSharding(sharding.mesh, spec))
    return (gradient,)


def _fewer_axes(spec: PartitionSpec) -> list[PartitionSpec]:
    """`spec`, the same without the innermost axis of the mesh, and so on to one without any."""
    specs, axes = [spec], [(part,) if isinstance(part, str) else part or () for part in spec]
    while any(axes):
        last = max(place for place, names in enumerate(axes) if names)
        axes[last] = axes[last][:-1]
        specs.append(PartitionSpec(*(names or None for names in axes)))
    return specs


gather.defvjp(_gather_forward, _gather_backward)


# What follows runs on every device of the axis context, on its own tokens.


def _without_pads(x: Tokens, tokens: int) -> Tokens:
    local = x.shape[1]
    if jax.lax.axis_size("context") * local == tokens:
        return x
    index = jax.lax.axis_index("context") * local + jnp.arange(local)
    return jnp.where((index < tokens)[:, None, None], x, 0)


def _ring(q: Tokens, k: Tokens, v: Tokens, tokens: int) -> Tokens:
    return _without_pads(ring_attention(q, k, v, "context", tokens), tokens)


def _ulysses(q: Tokens, k: Tokens, v: Tokens, tokens: int) -> Tokens:
    """DeepSpeed-Ulysses: all tokens of a part of the heads, between two exchanges."""
    local = q.shape[1]
    exchange = partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1)[:, :tokens] for x in (q, k, v))
    out = softmax_attention(q, k, v)
    pads = jax.lax.axis_size("context") * local - tokens
    out = jnp.pad(out, ((0, 0), (0, pads), (0, 0), (0, 0)))
    return exchange(out, split_axis=1, concat_axis=2)


def _shared_state(q: Tokens, k: Tokens, v: Tokens, maps: FeatureMap, tokens: int) -> Tokens:
    """Linear attention: what devices exchange is one state, whatever the number of tokens."""
    state = linear_attention_state(k, v, maps, key_lengths=_key_lengths(k, tokens))
    return _without_pads(apply_state(q, jax.lax.psum(state, "context"), maps), tokens)


def _key_lengths(k: Tokens, tokens: int) -> Int[Array, " batch"] | None:
    local = k.shape[1]
    if jax.lax.axis_size("context") * local == tokens:
        return None
    here = jnp.clip(tokens - jax.lax.axis_index("context") * local, 0, local)
    return jnp.full(k.shape[0], here, jnp.int32)
