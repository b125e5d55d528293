"""float8 weights, alone or with the scale of each tensor beside it, as bfloat16."""

import ml_dtypes
import numpy as np

from convert.tensors import Tensors
from linvideo_jax.errors import UserError
from linvideo_jax.lazy import BLOCK

FLOAT8 = "F8_E4M3"
WIDE = np.dtype(ml_dtypes.bfloat16)  # holds every float8 exactly

# ComfyUI's scaled files: a mark that they are, and beside X.weight what it is to be multiplied by
# and what its layer's input would be divided by.
MARK, SCALE, INPUT_SCALE = "scaled_fp8", "scale_weight", "scale_input"


class Widened:
    """`tensors.Tensors` of another, whose float8 tensors are scaled and given in bfloat16.

    UserError if a file has scales, but not for each of its float8 tensors.
    """

    def __init__(self, files: Tensors):
        self._files = files
        self.where, self.duplicates = files.where, files.duplicates
        suffixes = (MARK, f".{SCALE}", f".{INPUT_SCALE}")
        keys = [key for key in files.shapes if not key.endswith(suffixes)]
        self.scaled = len(keys) < len(files.shapes)
        self.shapes = {key: files.shapes[key] for key in keys}
        self.narrow = {key for key in keys if files.dtypes[key] == FLOAT8}
        self.dtypes = {
            key: "BF16" if key in self.narrow else name
            for key, name in files.dtypes.items()
            if key in self.shapes
        }
        lacking = {key for key in self.narrow if self._scale(key) not in files.shapes}
        if self.scaled and lacking:
            raise UserError(
                f"{files.where} is a scaled float8 file, but lacks the scale of "
                f"{', '.join(sorted(lacking))}."
            )
        wrong = [
            key
            for key in map(self._scale, self.narrow)
            if self.scaled and files.shapes[key] not in ((), (1,))
        ]
        if wrong:
            raise UserError(
                f"{files.where} has scales that are not one number: {', '.join(sorted(wrong))}."
            )

    @staticmethod
    def _scale(key: str) -> str:
        return f"{key.removesuffix('weight')}{SCALE}"

    def read(self, key: str) -> np.ndarray:
        """See `tensors.Tensors`."""
        stored = self._files.read(key)
        if key not in self.narrow:
            return stored
        scale = np.float32(1)
        if self.scaled:
            scale = self._files.read(self._scale(key)).astype(np.float32).reshape(())
        wide = np.empty(stored.shape, WIDE)
        source, target = stored.reshape(-1), wide.reshape(-1)
        for start in range(0, source.size, BLOCK):
            piece = slice(start, start + BLOCK)
            target[piece] = (source[piece].astype(np.float32) * scale).astype(WIDE)
        return wide
