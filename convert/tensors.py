"""Reading and writing safetensors without PyTorch: one file, or shards with an index."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from linvideo_jax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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


class TensorFiles:
    """The tensors of `folder/stem.safetensors`, or of the shards that its index names.

    `shapes`, `dtypes`: by key, read from the headers alone. `duplicates`: keys in two shards.
    UserError for a file that is missing, truncated or no safetensors file.
    """

    def __init__(self, folder: Path, stem: str):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self._files = {}
        for path in _files_of(folder, stem):
            try:
                file = safe_open(path, framework="numpy")
                for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    if key in self._files:
                        self.duplicates.append(key)
                    header = file.get_slice(key)
                    self.shapes[key] = tuple(header.get_shape())
                    self.dtypes[key] = header.get_dtype()
                    self._files[key] = file
            except SafetensorError as error:
                raise UserError(
                    f"{path} is truncated or no safetensors file ({error}); fetch it again."
                ) from error
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the dtype in which it is stored."""
        return self._files[key].get_tensor(key)

    def equal(self, key: str, other: str) -> bool:
        """Whether two keys hold the same array."""
        return np.array_equal(self.read(key), self.read(other))


def _files_of(folder: Path, stem: str) -> list[Path]:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise UserError(f"{single} is missing (and so is its index, {index.name}).")
        return [single]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map of keys to files.")
    paths = [folder / name for name in sorted(set(names.values()))]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{index} names files that are missing: {', '.join(absent)}.")
    return paths


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, marked as diffusers and transformers expect it."""
    contiguous = {key: np.ascontiguousarray(array) for key, array in sorted(tensors.items())}
    save_file(contiguous, path, metadata={"format": "pt"})
