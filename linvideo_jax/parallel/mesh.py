"""The mesh of devices: axes data, fsdp and context.

`data` and `fsdp` share the batch, `fsdp` the parameters and all that the optimiser keeps of them,
`context` the tokens of a video. `context` is the innermost axis, so that devices which exchange
keys and values are nearest to each other; slices of a multi-slice TPU meet on `data`, or `fsdp`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from linvideo_jax.errors import UserError

AXES = ("data", "fsdp", "context")
BATCH_AXES = ("data", "fsdp")
REST = (-1, 0)  # as a size: what the other axes leave over
_USAGE = f"write AXIS:SIZE with axes of {', '.join(AXES)}, such as context:4 or data:2,fsdp:4"


def parse(text: str) -> dict[str, int]:
    """Sizes from a flag such as "data:2,fsdp:2,context:2"; an axis that is not named is left out.

    UserError for anything else.
    """
    sizes = {}
    for entry in text.split(","):
        name, _, size = entry.strip().partition(":")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"the mesh {text!r} cannot be read: {_USAGE}.") from None
        if text.count(f"{name}:") > 1:
            raise UserError(f"the mesh {text!r} names {name} twice: {_USAGE}.")
    _check_names(sizes)
    return sizes


def resolve(asked: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of every axis; UserError if they do not multiply to `num_devices`.

    asked: sizes by axis; -1 or 0 is what the others leave over. `data` is that if it is not named,
    the others are 1.
    """
    _check_names(asked)
    sizes = {"data": -1, "fsdp": 1, "context": 1} | dict(asked)
    free = [name for name in AXES if sizes[name] in REST]
    if len(free) > 1:
        raise UserError(
            f"the mesh leaves both {' and '.join(free)} open: give a size to all axes but one."
        )
    if bad := [name for name in AXES if sizes[name] < -1]:
        raise UserError(f"the mesh has {bad[0]}:{sizes[bad[0]]}: choose 1 or more, or -1.")
    product = math.prod(size for name, size in sizes.items() if name not in free)
    if free:
        sizes[free[0]] = num_devices // product
        product *= sizes[free[0]]
    if product != num_devices:
        told = ", ".join(f"{name}:{size}" for name, size in sizes.items() if name not in free)
        verb = "does not divide" if free else "does not multiply to"
        devices = f"{num_devices} device{'s' if num_devices > 1 else ''}"
        raise UserError(f"the mesh {told} {verb} the {devices}: choose other sizes.")
    return {name: sizes[name] for name in AXES}


def make(asked: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices` (None: all of JAX's, of every host) with the sizes of `resolve`.

    Devices lie as their network does: neighbours along `context` are neighbours on a TPU's torus or
    GPUs of one host. UserError as from `resolve`, and if slices of a TPU do not divide the axes
    between which they lie.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(asked or {}, len(devices))
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def of_config(config: Any) -> dict[str, int]:
    """The sizes that `config.mesh` gives, for `resolve`; none without that group."""
    settings = config.get("mesh") or {}
    return {name: settings[name] for name in AXES if name in settings}


def from_config(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """`make` with the sizes of `of_config`."""
    return make(of_config(config), devices)


def of_host(mesh: Mesh) -> Mesh:
    """A mesh of this host's devices: as much of fsdp and context as they hold, data the rest."""
    count = jax.local_device_count()
    if count == mesh.size:
        return mesh
    context = math.gcd(mesh.shape["context"], count)
    fsdp = math.gcd(mesh.shape["fsdp"], count // context)
    return make({"fsdp": fsdp, "context": context}, jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Everywhere the same."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(mesh: Mesh, batch: int) -> tuple[str, ...] | None:
    """The axes over which a batch is shared: as many of data and fsdp as divide it."""
    axes, size = [], 1
    for name in BATCH_AXES:
        if batch % (size * mesh.shape[name]) == 0:
            axes.append(name)
            size *= mesh.shape[name]
    return tuple(axes) or None


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Of arrays whose first axis is a batch of this size."""
    return NamedSharding(mesh, PartitionSpec(batch_spec(mesh, batch)))


def batch_devices(mesh: Mesh) -> int:
    """In how many parts a batch lies."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def describe(mesh: Mesh) -> str:
    """Such as "data:2, fsdp:4, context:1"."""
    return ", ".join(f"{name}:{mesh.shape[name]}" for name in AXES)


def _arranged(sizes: Mapping[str, int], devices: list[Any]) -> np.ndarray:
    shape = [sizes[name] for name in AXES]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = next((axis for axis, size in enumerate(shape[:2]) if size % slices == 0), None)
    if outer is None:
        raise UserError(
            f"the mesh has data:{sizes['data']} and fsdp:{sizes['fsdp']}, but the devices are "
            f"{slices} TPU slices: make one of the two a multiple of {slices}."
        )
    between = [slices if axis == outer else 1 for axis in range(len(shape))]
    within = [size // count for size, count in zip(shape, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def _check_names(sizes: Mapping[str, int]) -> None:
    if unknown := [name for name in sizes if name not in AXES]:
        raise UserError(f"the mesh has no axis {unknown[0]!r}: {_USAGE}.")
