"""Reading and writing safetensors without PyTorch, and without holding more than one tensor."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensors(Protocol):
    """The tensors of one part of a model, in whatever files.

    where: for messages; shapes, dtypes (safetensors' names): by key; duplicates: keys that two
    files hold.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    duplicates: list[str]

    def read(self, key: str) -> np.ndarray:
        """One tensor in the dtype in which it is stored, mapped from its file."""
        ...


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not complete.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object into a folder that is not in use yet (`folders.replaced`)."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class TensorFiles:
    """`Tensors` of safetensors files: headers are read at once, values when they are asked for.

    UserError for a file that is missing, truncated or no safetensors file.
    """

    def __init__(self, paths: Sequence[Path], where: str):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self._bytes: dict[str, np.ndarray] = {}
        for path in paths:
            content, header = _open(path)
            self.duplicates += header.keys() & self.shapes.keys()
            for key, entry in header.items():
                self.shapes[key] = tuple(entry["shape"])
                self.dtypes[key] = entry["dtype"]
                self._bytes[key] = content[slice(*entry["data_offsets"])]

    @classmethod
    def of(cls, folder: Path, stem: str) -> "TensorFiles":
        """`folder/stem.safetensors`, or the shards that its index names."""
        return cls(_files_of(folder, stem), f"{folder / stem}.safetensors")

    def read(self, key: str) -> np.ndarray:
        """See `Tensors`."""
        dtype, data = DTYPES[self.dtypes[key]], self._bytes[key]
        if data.ctypes.data % dtype.itemsize:
            data = data.copy()  # numpy takes values at odd addresses, others do not
        return data.view(dtype).reshape(self.shapes[key])


def _open(path: Path) -> tuple[np.ndarray, dict[str, dict]]:
    """A file's values as mapped bytes, and its header by key."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # it checks that header and length are what they should be
        content = np.memmap(path, np.uint8, mode="r")
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); fetch it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    return content[start:], header


def _files_of(folder: Path, stem: str) -> list[Path]:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        if single.exists():
            return [single]
        shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if shards:
            return _all_shards(shards)
        raise UserError(f"{single} is missing (and so is its index, {index.name}).")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map of keys to files.")
    paths = [folder / name for name in sorted(set(names.values()))]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{index} names files that are missing: {', '.join(absent)}.")
    return paths


def _all_shards(shards: list[Path]) -> list[Path]:
    """The shards, if they are as many as their names (`-00001-of-00006`) say."""
    count = shards[0].stem.rpartition("-of-")[2]
    if len(shards) != int(count):
        raise UserError(
            f"{shards[0].parent} has {len(shards)} of the {int(count)} files that {shards[0].name} "
            "is one of: fetch the others."
        )
    return shards


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray | LazyArray],
    written: Callable[[int], None] = lambda size: None,
) -> None:
    """One safetensors file, marked as diffusers and transformers expect it.

    Lazy arrays are read one after the other; written: called with the bytes of each.
    """
    # Larger items first, as safetensors itself does: then every tensor is aligned to its items.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        array = tensors[key]
        end = offset + array.nbytes
        header[key] = {
            "dtype": _NAMES[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            array = np.ascontiguousarray(tensors[key])
            file.write(array.reshape(-1).view(np.uint8))
            written(array.nbytes)
