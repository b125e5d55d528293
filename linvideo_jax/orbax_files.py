"""Orbax trees on disk: written one array after the other, read one array at a time."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray

# Bytes. Orbax holds what it has compressed in memory until a file of its is full, and works on a
# few chunks at a time: with these an array of 1 GB takes 0.6 GB beside itself, with its own
# defaults several times its size.
CHUNK_BYTES = 64 * 2**20
FILE_BYTES = 256 * 2**20

# What zarr calls the description of an array.
_ENTRY = "/.zarray"


class _Borrowed(np.ndarray):
    """An array that Orbax does not copy before it writes it: nobody changes it meanwhile."""

    def __deepcopy__(self, memo):
        return self


class _FewAtATime(type_handlers.NumpyHandler):
    """Reads, writes and lets go of a few arrays before it turns to the next."""

    def __init__(self, written: Callable[[int], None]):
        super().__init__()
        self._written = written
        self._errors: list[ValueError] = []

    async def _open_and_write(self, *arguments) -> None:
        # Kept until all writes have ended: at the first error Orbax would let go of the others,
        # which then complain, and write on while their folder is being removed.
        try:
            await super()._open_and_write(*arguments)
        except ValueError as error:
            self._errors.append(error)

    async def serialize(self, values: Sequence[Any], infos, args=None):
        start = 0
        while start < len(values):
            # A commit waits for the disk, hence small arrays together.
            end, size = start, 0
            while end < len(values) and (end == start or size + values[end].nbytes <= CHUNK_BYTES):
                size += values[end].nbytes
                end += 1
            some = slice(start, end)
            arrays = [np.asarray(value).view(_Borrowed) for value in values[some]]
            for future in await super().serialize(arrays, infos[some], args[some]):
                future.result()
            if self._errors:
                raise OSError(_reason(self._errors[0]))
            self._written(size)
            start = end
        return []


def write(
    folder: Path,
    arrays: Mapping[str, np.ndarray | LazyArray],
    written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes arrays under flat names as a tree that Orbax's PyTreeCheckpointer restores.

    written: called with the bytes that are done since the last call. OSError if the disk refuses.
    """
    tree = _nested({name: LazyArray(a.shape, a.dtype, a.__array__) for name, a in arrays.items()})
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()),  # Orbax warns if it is not among them
        (LazyArray, _FewAtATime(written)),
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    save = ocp.args.PyTreeSave(tree, chunks, ocdbt_target_data_file_size=FILE_BYTES)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=save)


def read(folder: Path, names: Sequence[str]) -> dict[str, LazyArray]:
    """The arrays with these flat names; ValueError for one that is not there.

    Reading one later raises UserError if its data are damaged.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    base = {"driver": "file", "path": str(folder.absolute())}
    futures = {}
    for name in names:
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store}
        futures[name] = ts.open(spec, open=True, read=True, context=context)
    return {name: _lazy(folder, future.result()) for name, future in futures.items()}


def names(folder: Path) -> set[str]:
    """The flat names of the arrays there; ValueError if it is no such tree or is damaged."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": str(folder.absolute())}}
    keys = ts.KvStore.open(store).result().list().result()
    return {key.decode().removesuffix(_ENTRY) for key in keys if key.endswith(_ENTRY.encode())}


def _lazy(folder: Path, store: ts.TensorStore) -> LazyArray:
    def read() -> np.ndarray:
        try:
            return store.read().result()
        except ValueError as error:
            raise damaged(folder, error) from error

    return LazyArray(store.shape, store.dtype.numpy_dtype, read)


def damaged(folder: Path, error: Exception) -> UserError:
    """The error of a folder whose data cannot be read."""
    return UserError(f"{folder} is damaged or not complete ({_reason(error)}).")


def _reason(error: Exception) -> str:
    """The operating system's word in one of tensorstore's long messages, or its first line."""
    text = str(error).strip()
    if found := re.search(r"([^:]+) \[os_error_code", text):
        return found[1].strip()
    return text.splitlines()[0].rstrip(".") if text else repr(error)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    return tree
