"""PyTorch's own files (.pth, .pt): read and written with PyTorch, never running their code."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from convert import tensors
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import LazyArray

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# Under which such a file may hold the weights beside other things. Distillation codes (CausVid,
# Self-Forcing, Self-Forcing-Plus) keep a generator, its moving average and a critic: the average is
# what they sample.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "generator_ema", "generator")


def import_torch(path: Path) -> ModuleType:
    """PyTorch; UserError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a file of PyTorch's, which is not installed: "
            'pip install "linvideo_jax[torch]".'
        ) from None
    return torch


class PickleFile:
    """`tensors.Tensors` of one file, mapped, with torch.load's `weights_only`.

    UserError if the file is no plain file of weights; then none of its code was run.
    """

    def __init__(self, path: Path):
        torch = import_torch(path)
        self.where = str(path)
        self.duplicates: list[str] = []
        self._tensors = _load(torch, path)
        names = {
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.float8_e4m3fn: "F8_E4M3",
        }
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self.dtypes = {
            key: names.get(tensor.dtype, str(tensor.dtype)) for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """See `tensors.Tensors`."""
        return to_numpy(self._tensors[key])


def _load(torch: ModuleType, path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than weights and is not loaded, since loading could run its code: "
            "take a safetensors file, or one of weights alone."
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "empty"
        raise UserError(
            f"{path} is truncated or no file of torch.save's present format ({reason})."
        ) from error
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name.")
    found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise UserError(f"{path} holds no tensors by name.")
    return found


def to_numpy(tensor: Any) -> np.ndarray:
    """A CPU tensor as a numpy array on the same memory, narrow floats as those of ml_dtypes."""
    import torch

    tensor = tensor.detach()
    narrow = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    if tensor.dtype not in narrow:
        return tensor.numpy()
    same_size, dtype = narrow[tensor.dtype]
    return tensor.contiguous().view(same_size).numpy().view(dtype)


def write(path: Path, arrays: Mapping[str, np.ndarray | LazyArray]) -> None:
    """One file that torch.load takes, of the weights alone; values come from disk, not memory.

    torch.save wants all tensors at once: they are mapped from a safetensors file, written first
    and removed in the end.
    """
    torch = import_torch(path)
    mapped = path.with_suffix(".safetensors")
    tensors.write(mapped, arrays)
    files = tensors.TensorFiles([mapped], str(mapped))

    def tensor(key: str) -> Any:
        array = files.read(key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # and nobody writes to it
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

    try:
        torch.save({key: tensor(key) for key in arrays}, path)
    finally:
        mapped.unlink()
