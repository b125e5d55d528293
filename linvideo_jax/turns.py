"""The networks of a checkpoint, of which one at a time is on the device.

A checkpoint opened here stays on disk; `Turns` reads a part when it is needed. What
`checkpoints.load` has put on the device already is used where it is.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from linvideo_jax import checkpoints
from linvideo_jax.errors import UserError
from linvideo_jax.models.module import Params
from linvideo_jax.models.tokenizer import Tokenizer
from linvideo_jax.models.wan import initial_feature_map
from linvideo_jax.parts import STACKED, flatten, unflatten

# A few small arrays of each part: other values in them mean another model.
_MARKS = {
    "transformer": ("proj_out.bias", "proj_out.kernel"),
    "vae": ("decoder.conv_out.bias", "decoder.conv_out.kernel"),
    "text_encoder": (
        "blocks.0.attention.relative_attention_bias.embedding",
        "final_layer_norm.scale",
    ),
}


def open_folder(folder: Path | str) -> checkpoints.Checkpoint:
    """A checkpoint without its parameters, which stay on disk, whatever their size.

    UserError as from `checkpoints.load` of all parts, except for damage inside their data, and for
    one without a tokenizer.
    """
    config, _, tokenizer, scheduler = checkpoints.read_flat(folder)
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer: convert it again from a source that has one as well, such "
            f"as --source=FILE,Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or copy one to "
            f"{Path(folder) / 'tokenizer'}."
        )
    models = checkpoints.model_configs(config)
    return checkpoints.Checkpoint(
        path=Path(folder),
        config=config,
        wan_config=models["transformer"],
        transformer=None,
        vae_config=models["vae"],
        vae=None,
        umt5_config=models["text_encoder"],
        text_encoder=None,
        tokenizer=Tokenizer.load(tokenizer),
        scheduler=scheduler,
    )


def mark(checkpoint: checkpoints.Checkpoint, part: str) -> str:
    """A short hash of a part's parameters that training changes; the same on disk and loaded."""
    params = getattr(checkpoint, part)
    if params is None:
        flat = checkpoints.read_flat(checkpoint.path, (part,))[1][part]
    else:
        flat = {name: _leaf(params, name) for name in _MARKS[part]}
    digest = hashlib.sha256()
    for name in _MARKS[part]:
        digest.update(np.asarray(flat[name]).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def _leaf(params: Params, name: str) -> Any:
    first, *rest = name.split(".")
    layer = int(rest.pop(0)) if first == STACKED else None
    leaf = params[first]
    for key in rest:
        leaf = leaf[key]
    return leaf if layer is None else leaf[layer]


class Turns:
    """Gives the parameters of one part after the other; the one before leaves the device.

    The transformer and the VAE wait in the host's memory for their next turn, or stay on the device
    if they are `resident`; the text encoder, which is needed once, is dropped. `dtype`: of the
    large matrices, which the networks would cast to it anyway; the rest, and the VAE, is float32.
    `place`: brings a tree to the devices.
    """

    def __init__(
        self,
        checkpoint: checkpoints.Checkpoint,
        dtype: Any,
        place: Callable[[Params], Params] = jax.device_put,
        resident: bool = False,
    ):
        self._checkpoint, self._dtype, self._place = checkpoint, dtype, place
        self._resident = resident
        self._waiting: dict[str, Params] = {}
        self._on_device: dict[str, Params] = {}

    def params(self, part: str) -> Params:
        """The parameters of "transformer", "vae" or "text_encoder", on the device.

        Hold them no longer than needed: only what nobody holds leaves the device.
        """
        held = getattr(self._checkpoint, part)
        if held is not None:
            return held
        if part not in self._on_device:
            if self._resident:
                self._on_device.pop("text_encoder", None)
            else:
                self._on_device.clear()
            host = self._waiting.get(part) or self._read(part)
            if part != "text_encoder" and not self._resident:
                self._waiting[part] = host
            self._on_device[part] = self._place(host)
        return self._on_device[part]

    def _read(self, part: str) -> Params:
        config, flat, _, _ = checkpoints.read_flat(self._checkpoint.path, (part,))
        model = checkpoints.model_configs(config)[part]
        arrays = flat.pop(part)
        if part == "transformer" and config["feature_map"]:
            initial = {"blocks": {"attn1": {"feature_map": initial_feature_map(model)}}}
            arrays = flatten(initial) | arrays  # on disk are those of the linear layers
        dtype = np.float32 if part == "vae" else self._dtype
        return unflatten(part, model, arrays, np.float32, products=dtype, create=np.asarray)
