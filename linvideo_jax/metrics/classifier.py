"""A small network that reads clips of moving digits: what moves where, per colour.

An attention map per colour finds that colour's digit in every frame. A glimpse cut out around the
map's centre is read as a small image, and with the path of the centre it is read over time. The
same network reads pixels or latents.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from linvideo_jax.data.digits import (
    ABSENT,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    INCONSISTENT,
    SPEEDS,
    Labels,
)
from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.models.module import Params, bind

NO_DIRECTION = len(DIRECTIONS)  # read where a digit stands still or jumps about
_HEADS = {
    "digit": INCONSISTENT + 1,
    "direction": NO_DIRECTION + 1,
    "speed": len(SPEEDS),
    "bounce": 2,
}
_MAPS = 2  # attention maps of each colour: the first is trained to be the digit's centre
_SLOTS = len(COLOURS)


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of one classifier; `patch` is the stride of its first convolution (1 for latents).

    glimpse: cells a side of the square around a digit, of `patch` px or one latent.
    """

    in_channels: int
    patch: int
    glimpse: int
    glimpse_channels: int
    width: int = 96
    depth: int = 2
    slot_width: int = 64
    feature_width: int = 64
    moments: int = 8
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClassifierConfig":
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})


PIXELS = ClassifierConfig(in_channels=3, patch=4, glimpse=10, glimpse_channels=8)
LATENTS = ClassifierConfig(in_channels=16, patch=1, glimpse=6, glimpse_channels=16)


class Outputs(NamedTuple):
    """Raw outputs of `DigitsClassifier`; b clips, f frames (of pixels or latents)."""

    logits: dict[str, Float[Array, "b 6 classes"]]
    background: Float[Array, "b 4"]
    positions: Float[Array, "b 6 f xy"]  # centre of each colour's map, share of the frame's side
    features: Float[Array, "b features"]


class Reading(NamedTuple):
    """What the classifier sees (numpy, n clips).

    `labels.digit` may be ABSENT or INCONSISTENT, `labels.direction` NO_DIRECTION; the labels of
    motion of an absent digit mean nothing. `features` serve the Frechet distance.
    """

    labels: Labels
    positions: np.ndarray
    features: np.ndarray


class DigitsClassifier(nnx.Module):
    """Reads clips [b, f, height, width, in_channels]; see the module's docstring."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        width, slot = config.width, config.slot_width

        def conv(channels, out, kernel, stride=1):
            padding = "SAME" if stride == 1 or kernel > stride else "VALID"
            return nnx.Conv(
                channels, out, kernel, strides=stride, padding=padding, dtype=dtype, rngs=rngs
            )

        def linear(size, out):
            return nnx.Linear(size, out, dtype=dtype, rngs=rngs)

        if config.patch == 1:
            self.stem = nnx.List([conv(config.in_channels, width, (3, 3))])
        else:
            patch = (config.patch, config.patch)
            self.stem = nnx.List(
                [
                    nnx.Conv(
                        config.in_channels, width // 2, patch, strides=patch, dtype=dtype, rngs=rngs
                    ),
                    nnx.Conv(width // 2, width, (3, 3), strides=(2, 2), dtype=dtype, rngs=rngs),
                ]
            )
        self.norms = nnx.List(
            [nnx.LayerNorm(width, dtype=dtype, rngs=rngs) for _ in range(config.depth + 1)]
        )
        self.convs = nnx.List([conv(width, width, (3, 3)) for _ in range(config.depth)])
        self.maps = linear(width, _SLOTS * _MAPS)
        # What of the first convolution shows a digit of each colour, and its reading.
        fine, shown = self.stem[0].out_features, config.glimpse_channels
        self.shows = linear(fine, _SLOTS * shown)
        self.glance = linear(config.glimpse**2 * shown, width)
        self.sight = linear(width, slot)
        # Per frame and colour: features, two centres and their steps, the maps' evidence.
        self.slot = nnx.Embed(_SLOTS, slot, rngs=rngs)
        self.frame = linear(width + 5 * _MAPS, slot)
        self.time = nnx.List([conv(slot, slot, (5,)) for _ in range(2)])
        self.moment = linear(slot, slot // 4)
        summary = 3 * slot + config.moments * (slot // 4) + config.moments * 2 * _MAPS + 1
        self.hidden = linear(summary, 2 * config.feature_width)
        self.last = linear(2 * config.feature_width, config.feature_width)
        self.heads = nnx.Dict({name: linear(config.feature_width, n) for name, n in _HEADS.items()})
        self.background = linear(width, len(BACKGROUNDS))

    def __call__(self, clips: Float[Array, "b f height width channels"]) -> Outputs:
        b, f = clips.shape[:2]
        x = clips.reshape(b * f, *clips.shape[2:]).astype(jnp.dtype(self.config.dtype))
        fine = x = self.stem[0](x)
        for layer in self.stem[1:]:
            x = layer(nnx.gelu(x))
        for norm, layer in zip(self.norms[:-1], self.convs, strict=True):
            x = x + layer(nnx.gelu(norm(x)))
        x = self.norms[-1](x)
        side = x.shape[1]
        x = x.reshape(b, f, side * side, -1)

        logits = self.maps(x).astype(jnp.float32).reshape(b, f, side * side, _SLOTS, _MAPS)
        weights = jax.nn.softmax(logits, axis=2)
        evidence = jax.nn.logsumexp(logits, axis=2) - 5.0  # [b, f, slots, maps]
        grid = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
        cells = jnp.stack([jnp.tile(grid, side), jnp.repeat(grid, side)], -1)
        centres = jnp.einsum("bfpsm,pc->bsfmc", weights, cells)
        found = jnp.einsum("bfps,bfpc->bsfc", weights.mean(-1).astype(x.dtype), x)

        path = (centres - centres.mean(2, keepdims=True)).reshape(b, _SLOTS, f, -1) * 4
        step = jnp.diff(path, axis=2, append=path[:, :, -1:]) * 10
        seen = [found, path, step, evidence.transpose(0, 2, 1, 3)]
        h = self.frame(jnp.concatenate([s.astype(jnp.float32) for s in seen], -1))
        shown = self.shows(fine).reshape(b, f, *fine.shape[1:3], _SLOTS, -1)
        h = h + self.sight(nnx.gelu(self.glance(_cut(shown, centres[:, :, :, 0], self.config))))
        h = h + self.slot.embedding[:, None].astype(h.dtype)
        for layer in self.time:
            h = h + layer(nnx.gelu(h).reshape(b * _SLOTS, f, -1)).reshape(h.shape)
        h = nnx.gelu(h).astype(jnp.float32)

        def at_moments(values):
            shape = (b, _SLOTS, self.config.moments, values.shape[-1])
            return jax.image.resize(values, shape, "linear").reshape(b, _SLOTS, -1)

        moments = at_moments(self.moment(h).astype(jnp.float32))
        length = jnp.full((b, _SLOTS, 1), jnp.log(f / 10.0))
        summary = [h.mean(2), h.max(2), h.min(2), moments, at_moments(path), length]
        y = nnx.gelu(self.hidden(jnp.concatenate(summary, -1)))
        y = nnx.gelu(self.last(y))
        heads = {name: head(y).astype(jnp.float32) for name, head in self.heads.items()}
        ground = x.mean((1, 2))
        there = 1 - jax.nn.softmax(heads["digit"])[..., ABSENT, None]
        return Outputs(
            heads,
            self.background(ground).astype(jnp.float32),
            centres[:, :, :, 0],
            jnp.concatenate([(y * there).sum(1), ground], -1).astype(jnp.float32),
        )


def _cut(shown, centres, config):
    """Squares around centres [b, slots, f, xy] of maps [b, f, side, side, slots, channels].

    Bilinear, flat in their cells, of equal contrast: [b, slots, f, cells * channels]. Where to look
    is learned from the known centres, not from what is seen there.
    """
    side, size = shown.shape[2], config.glimpse
    at = jax.lax.stop_gradient(centres)[..., None] * side - 0.5 + jnp.arange(size) - (size - 1) / 2
    weights = jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(side))).astype(shown.dtype)
    columns, rows = weights[:, :, :, 0], weights[:, :, :, 1]
    cut = jnp.einsum("bfyxsc,bsfjx->bsfyjc", shown, columns)
    cut = jnp.einsum("bsfyjc,bsfiy->bsfijc", cut, rows).astype(jnp.float32)
    cut = cut - cut.mean((3, 4), keepdims=True)
    cut = cut * jax.lax.rsqrt(jnp.mean(cut**2, (3, 4, 5), keepdims=True) + 1e-3)
    return cut.reshape(*cut.shape[:3], -1)


@jax.jit(static_argnames="config")
def _read(params, config, clips):
    out = bind(DigitsClassifier, config, params)(clips)
    best = {name: jnp.argmax(logits, -1) for name, logits in out.logits.items()}
    return Reading(
        Labels(**best, background=jnp.argmax(out.background, -1)), out.positions, out.features
    )


def read(
    params: Params,
    config: ClassifierConfig,
    clips: Float[Array, "n frames height width channels"],
    batch_size: int = 32,
) -> Reading:
    """Reads n clips of one length (pixels in [-1, 1], or normalised latents) in batches."""
    readings = []
    for begin in range(0, len(clips), batch_size):
        batch = clips[begin : begin + batch_size]
        short = batch_size - len(batch) if len(clips) > batch_size else 0
        padded = np.pad(batch, [(0, short)] + [(0, 0)] * 4) if short else batch
        readings.append(jax.device_get(_read(params, config, padded)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(clips)], *readings)


def save(
    folder: str | Path, kind: str, params: Params, config: ClassifierConfig, validation: dict
) -> None:
    """Writes FOLDER/{kind}.safetensors (float16) and its entry of FOLDER/config.json.

    kind is "pixels" or "latents"; `validation` holds the figures of `validate`, json values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = nnx.traversals.flatten_mapping(params)
    arrays = {".".join(map(str, path)): np.asarray(v, np.float16) for path, v in flat.items()}
    with replacing(folder / f"{kind}.safetensors") as temporary:
        save_file(arrays, temporary)
    path = folder / "config.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[kind] = asdict(replace(config, dtype="float32")) | {"validation": validation}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n")


class Classifier(NamedTuple):
    """A classifier from disk; `validation` are its figures on held-out real clips."""

    params: Params
    config: ClassifierConfig
    validation: dict

    def read(self, clips: Float[Array, "n frames height width channels"]) -> Reading:
        """`read` with these parameters."""
        return read(self.params, self.config, clips)


def load(folder: str | Path, kind: str) -> Classifier:
    """Reads what `save` wrote; kind is "pixels" or "latents". UserError where it is not there."""
    path = Path(folder) / f"{kind}.safetensors"
    try:
        entry = json.loads((Path(folder) / "config.json").read_text())[kind]
        arrays = load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no readable digits classifier for {kind} ({error}); "
            "restore the shipped folder or train one."
        ) from None
    tree = nnx.traversals.unflatten_mapping(
        {
            tuple(int(name) if name.isdigit() else name for name in key.split(".")): jnp.asarray(
                value, jnp.float32
            )
            for key, value in arrays.items()
        }
    )
    return Classifier(tree, ClassifierConfig.from_dict(entry), entry["validation"])
