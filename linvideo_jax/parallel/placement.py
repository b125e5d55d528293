"""Where a stage's arrays lie: on one device as ever, or shared out over a mesh of any hosts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from linvideo_jax.errors import UserError
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel import rules
from linvideo_jax.parallel.layout import MeshLayout, layout_of


@dataclass(frozen=True)
class Placement:
    """The mesh of a stage, and the layout for its models; layout None: a single device."""

    mesh: Mesh
    layout: MeshLayout | None

    @classmethod
    def of(
        cls, config: Any, heads: int, devices: Sequence[jax.Device] | None = None
    ) -> "Placement":
        """By `config.mesh` on `devices` (None: all of all hosts), for a model with so many heads.

        UserError for a mesh that does not fit the devices, or heads that it does not divide.
        """
        return cls.by_sizes(meshes.of_config(config), heads, exchange_of(config), devices)

    @classmethod
    def by_sizes(
        cls,
        sizes: Mapping[str, int],
        heads: int,
        exchange: str = "auto",
        devices: Sequence[jax.Device] | None = None,
    ) -> "Placement":
        """`of` with the sizes of the axes (`mesh.resolve`) in the place of a configuration."""
        mesh = meshes.make(sizes, devices)
        return cls(mesh, layout_of(mesh, heads, exchange))

    @classmethod
    def of_host(cls, config: Any, heads: int) -> "Placement":
        """On the devices of this host alone, with as much of `config.mesh` as they hold.

        UserError as from `of`.
        """
        mesh = meshes.of_host(meshes.from_config(config))
        return cls(mesh, layout_of(mesh, heads, exchange_of(config)))

    def params(self, tree: Any) -> Any:
        """Parameters, or a state, laid out by the table; every host gives the same values."""
        if self.layout is None:
            return self._committed(tree)
        return rules.place(tree, self.mesh)

    def make(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, a tree of arrays that are made where they lie by the table."""
        if self.layout is None:
            return self._committed(function(*arguments))
        shardings = rules.shardings(jax.eval_shape(function, *arguments), self.mesh)
        return jax.jit(function, out_shardings=shardings)(*arguments)

    def everywhere(self, tree: Any) -> Any:
        """Arrays that every device has whole; every host gives the same values."""
        if self.layout is None:
            return self._committed(tree)
        return jax.tree.map(lambda leaf: rules.put(leaf, meshes.replicated(self.mesh)), tree)

    def _committed(self, tree: Any) -> Any:
        """On the single device, bound to it.

        A program that uses the host's memory (remat "offload") gives back bound arrays, and would
        be compiled a second time for them.
        """
        return jax.device_put(tree, self.mesh.devices.item())

    def rows(self, batch_size: int, parts: int = 1) -> Int[np.ndarray, " rows"]:
        """Which rows of a batch this host gives to `batch`, in ascending order.

        UserError if the mesh does not share a batch of this size, in so many parts, evenly.
        """
        if self.layout is None:
            return np.arange(batch_size)
        check_batch(self.mesh, batch_size, parts)
        sharding = meshes.batch_sharding(self.mesh, batch_size)
        held = sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

    def batch(self, tree: Any, batch_size: int) -> Any:
        """A batch on the mesh, of which each host gives its `rows`."""
        if self.layout is None:
            return tree
        rows = self.rows(batch_size)
        sharding = meshes.batch_sharding(self.mesh, batch_size)

        def placed(leaf):
            def part(index):
                first, stop, _ = index[0].indices(batch_size)
                here = np.searchsorted(rows, first)
                return leaf[here : here + stop - first]

            return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

        return jax.tree.map(placed, tree)


def check_batch(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """UserError if the mesh does not share a batch of this size, in so many parts, evenly."""
    multiple = meshes.batch_devices(mesh) * parts
    if batch_size % multiple:
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise UserError(
            f"batches of {batch_size}{in_parts} cannot be shared evenly by the mesh "
            f"{meshes.describe(mesh)}: choose a multiple of {multiple}."
        )


def whole(tree: Any) -> Any:
    """The arrays of `tree` on this host, as numpy; with several hosts all must ask for it."""
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def exchange_of(config: Any) -> str:
    """`config.mesh.exchange`, "auto" without it."""
    return (config.get("mesh") or {}).get("exchange", "auto")
