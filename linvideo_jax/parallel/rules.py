"""How the parameters lie on the mesh, in one table; and all that has their shapes.

A name is a leaf's path joined by "/": `params/blocks/attn1/to_q/kernel`. The optimiser's moments,
the moving average and the networks beside the student end in the same path, so one table serves
every tree. The axis of the layers is never shared: a scan takes one layer's shards at a time and
gathers them (`layer_spec`). What the table shares over `fsdp` is shared over `context`, too:
devices that share a video's tokens need the same weights, but not to keep them.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The first pattern found at the end of a name says where its axes lie; nothing found, or another
# number of axes: everywhere the same. Biases, norms and tables are a thousandth of all parameters,
# and the VAE (0.5 GB) is needed whole: its kernels have four and five axes.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Of every layer [layers, inputs, outputs], in the transformer and in the text encoder.
    (r"blocks/.*/kernel", PartitionSpec(None, "fsdp", None)),
    # [layers, heads, head_dim, features]; the warm-up keeps moments of these alone.
    (r"(blocks/.*/feature_map|warmup/0/[mn]u)/[qk]", PartitionSpec(None, "fsdp", None, None)),
    # Of the time, the text and the output [inputs, outputs].
    (r"kernel", PartitionSpec("fsdp", None)),
    # Of the text encoder [words, dim].
    (r"embedding", PartitionSpec("fsdp", None)),
)
_RULES = tuple((re.compile(rf"(?:^|/){pattern}$"), spec) for pattern, spec in RULES)


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where the axes of the leaf `name` lie; an axis that its devices do not divide is not shared.

    A matrix whose own axis does not divide is shared along its next one that does.
    """
    wanted = next((spec for pattern, spec in _RULES if pattern.search(name)), ())
    if len(wanted) != len(shape):
        return PartitionSpec()
    for axis, name_of_axis in enumerate(wanted):
        if name_of_axis is None:
            continue
        for axes in (("fsdp", "context"), ("fsdp",), ("context",)):
            axes = tuple(one for one in axes if mesh.shape[one] > 1)
            size = math.prod(mesh.shape[one] for one in axes)
            for other in range(axis, len(shape)):
                if axes and shape[other] % size == 0:
                    return PartitionSpec(*(None,) * other, axes[0] if len(axes) == 1 else axes)
    return PartitionSpec()


def layer_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """`spec` of one layer of the leaf `blocks/name`, without the axis of the layers."""
    return PartitionSpec(*spec(f"blocks/{name}", (1, *shape), mesh)[1:])


def name_of(path: tuple) -> str:
    """The name of a leaf: keys, fields and indices of its path, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding`, one for every array (or ShapeDtypeStruct) of `tree`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(name_of(path), leaf.shape, mesh)), tree
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree` laid out by the table.

    With several hosts each holds the same values, of which it keeps its part.
    """
    return jax.tree.map(put, tree, shardings(tree, mesh))


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array with this sharding; every host gives the same values."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
