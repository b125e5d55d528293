"""Our checkpoint folder, the same whether converted, trained or distilled.

    DIR/{config.json, manifest.json, scheduler_config.json,
         tokenizer/, transformer/, vae/, text_encoder/}

The last three are Orbax trees with one array per layer and parameter, stacked when loaded.
config.json holds the sizes of each part under diffusers' key names, `linear_layers` (counted from
0), `feature_map` and the sampling defaults; nothing else stores them.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import linvideo_jax
from convert import importer, sources
from convert.sources import SAMPLING
from convert.tensors import read_json, write_json
from linvideo_jax import folders, orbax_files
from linvideo_jax.errors import UserError
from linvideo_jax.models import registry
from linvideo_jax.models.module import Params
from linvideo_jax.models.tokenizer import Tokenizer
from linvideo_jax.models.umt5 import UMT5Config
from linvideo_jax.models.vae import VAEConfig
from linvideo_jax.models.wan import WanConfig, initial_feature_map
from linvideo_jax.parts import (
    DTYPES,
    FEATURE_MAP,
    PARTS,
    Flat,
    cast,
    flat_shapes,
    flatten,
    unflatten,
)
from linvideo_jax.progress import Progress

MANIFEST = "manifest.json"

# Of config.json; `SAMPLING` has a default for what is not named here.
REQUIRED = (
    "linear_layers",
    "feature_map",
    "sampler",
    "num_inference_steps",
    "guidance_scale",
    "flow_shift",
)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; a part that was not asked for is None.

    config: as in config.json; transformer, vae, text_encoder: parameters as nested dicts of JAX
    arrays, layers stacked; scheduler: diffusers' scheduler_config.json.
    """

    path: Path
    config: dict[str, Any]
    wan_config: WanConfig | None
    transformer: Params | None
    vae_config: VAEConfig | None
    vae: Params | None
    umt5_config: UMT5Config | None
    text_encoder: Params | None
    tokenizer: Tokenizer | None
    scheduler: dict[str, Any]

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers whose self-attention is linear, counted from 0."""
        return tuple(self.config["linear_layers"])

    @property
    def sampling(self) -> dict[str, Any]:
        """The defaults with which this model is sampled, under the names of sample.py's flags."""
        sampling = {key: self.config.get(key, default) for key, default in SAMPLING.items()}
        if sampling["negative_prompt"] is None:
            sampling["negative_prompt"] = registry.negative_prompt(self.wan_config)
        return sampling

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer's files, for `save`."""
        return self.tokenizer.folder if self.tokenizer else None


def make_config(
    transformer: WanConfig | None = None,
    vae: VAEConfig | None = None,
    text_encoder: UMT5Config | None = None,
    *,
    linear_layers: Sequence[int] = (),
    sampling: Mapping[str, Any] = SAMPLING,
) -> dict[str, Any]:
    """The content of config.json; what `sampling` lacks is diffusers' default."""
    models = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    return {
        **{part: model.to_dict() for part, model in models.items() if model is not None},
        "linear_layers": sorted(int(layer) for layer in linear_layers),
        "feature_map": transformer.feature_map if transformer is not None else None,
        **SAMPLING,
        **{key: sampling[key] for key in SAMPLING if key in sampling},
    }


def default_scheduler(flow_shift: float) -> dict[str, Any]:
    """diffusers' scheduler_config.json of the scheduler that Wan2.1's checkpoints name."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow_shift,
        "solver_order": 2,
        "solver_type": "bh2",
    }


def few_step_scheduler(flow_shift: float, num_inference_steps: int) -> dict[str, Any]:
    """The same without history, which is Euler's hop: how diffusers samples a distilled model."""
    return {
        **default_scheduler(flow_shift),
        "solver_order": 1,
        "disable_corrector": list(range(num_inference_steps)),
    }


def save(
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    transformer: Params | None = None,
    vae: Params | None = None,
    text_encoder: Params | None = None,
    tokenizer: Path | str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    source: str | None = None,
) -> None:
    """Writes a checkpoint whole or not at all; it replaces one that is there.

    config: see `make_config`; tokenizer: a folder to copy; dtype: "float32", "bfloat16", "float16",
    or None to keep each array's own; source: where the weights are from, for the manifest.
    Feature maps are written for the linear layers only. UserError if `folder` cannot be written, or
    a value is beyond `dtype`; ValueError if parameters do not fit the config, or it lacks a key.
    """
    params = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    flat = {part: flatten(tree) for part, tree in params.items() if tree is not None}
    save_flat(
        folder,
        config=config,
        flat=flat,
        tokenizer=tokenizer,
        scheduler=scheduler,
        dtype=dtype,
        source=source,
    )


def save_flat(
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    flat: Mapping[str, Flat],
    tokenizer: Path | str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    source: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """`save` of parameters under flat names, by part; lazy ones are read one at a time.

    provenance: more for the manifest; progress: whether to show it.
    """
    config = dict(config)
    if problem := _config_problem(config):
        raise ValueError(f"config cannot be used: {problem}.")
    stored = {part: _stored(part, config, arrays, dtype) for part, arrays in flat.items()}
    total = sum(array.nbytes for arrays in stored.values() for array in arrays.values())
    folders.check_space(Path(folder), total)
    with folders.replaced(Path(folder), marker=MANIFEST) as new:
        for part, arrays in stored.items():
            with contextlib.ExitStack() as stack:
                bar = None
                if progress:
                    size = sum(array.nbytes for array in arrays.values())
                    bar = stack.enter_context(Progress(part, size, unit="B"))
                orbax_files.write(new / part, arrays, bar.add if bar else lambda size: None)
        if tokenizer is not None:
            shutil.copytree(tokenizer, new / "tokenizer")
        scheduler = dict(scheduler or default_scheduler(config["flow_shift"]))
        write_json(new / "scheduler_config.json", scheduler)
        write_json(new / "config.json", config)
        manifest = {
            "linvideo_jax": linvideo_jax.__version__,
            "source": source,
            **(provenance or {}),
            "sizes": {part: config[part] for part in stored},
            "parts": {part: _summary(arrays) for part, arrays in stored.items()},
        }
        write_json(new / MANIFEST, manifest)


def load(
    folder: Path | str,
    parts: Sequence[str] = tuple(PARTS),
    *,
    dtype: str | None = "float32",
    create: Callable[[np.ndarray, Any], Any] = jnp.asarray,
) -> Checkpoint:
    """Loads a checkpoint of ours, a folder in diffusers' layout, or a transformer-only folder.

    parts: which networks; dtype: of the parameters, None for those stored; create: np.asarray
    leaves them in the host's memory. Feature maps of layers that are not linear are the initial
    ones. UserError for a folder that is none of the three,
    lacks a part, or is damaged.
    """
    config, flat, tokenizer, scheduler = read_flat(folder, parts)
    models = model_configs(config)
    if "transformer" in parts and config["feature_map"]:
        initial = initial_feature_map(models["transformer"])
        filled = flatten({"blocks": {"attn1": {"feature_map": initial}}})
        flat["transformer"] = filled | flat["transformer"]
    to = None if dtype is None else DTYPES[dtype]
    params = {
        part: unflatten(part, models[part], flat.pop(part), to, create=create) for part in parts
    }
    return Checkpoint(
        path=Path(folder),
        config=config,
        wan_config=models.get("transformer"),
        transformer=params.get("transformer"),
        vae_config=models.get("vae"),
        vae=params.get("vae"),
        umt5_config=models.get("text_encoder"),
        text_encoder=params.get("text_encoder"),
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        scheduler=scheduler,
    )


def model_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of every part that config.json describes."""
    models = {part: PARTS[part].config.from_dict(config[part]) for part in PARTS if part in config}
    if "transformer" in models:
        models["transformer"] = replace(models["transformer"], feature_map=config["feature_map"])
    return models


def read_flat(
    folder: Path | str, parts: Sequence[str] = tuple(PARTS)
) -> tuple[dict[str, Any], dict[str, Flat], Path | None, dict[str, Any]]:
    """config, stored arrays by part and flat name, tokenizer folder and scheduler of any folder
    that `load` takes; feature maps of the linear layers only."""
    path = Path(folder)
    folders.recover(path)
    if (path / MANIFEST).exists():
        return _read_own(path, parts)
    if sources.kind_of(path) is None:
        what = "is no checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}: give a folder that this program wrote (with {MANIFEST}), one in "
            "diffusers' layout (model_index.json), or a transformer-only one (config.json, base)."
        )
    source = sources.find(path, parts)
    return source_config(source), importer.read(source, parts), source.tokenizer, source.scheduler


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What is recorded of how a checkpoint was made; empty for folders of PyTorch's world."""
    path = Path(folder) / MANIFEST
    return read_json(path) if path.exists() else {}


def source_config(source: sources.Source) -> dict[str, Any]:
    """The config.json of a folder from PyTorch's world."""
    layers = source.config["linear_layers"]
    return make_config(**source.models, linear_layers=layers, sampling=source.config)


def _read_own(path: Path, parts: Sequence[str]):
    config = read_json(path / "config.json")
    if problem := _config_problem(config):
        raise UserError(f"{path / 'config.json'} cannot be used: {problem}.")
    flat = {}
    for part in parts:
        if part not in config or not (path / part).is_dir():
            raise UserError(f"{path} has no {part}: convert or save it with that part.")
        try:
            names = orbax_files.names(path / part)
            flat[part] = orbax_files.read(path / part, sorted(names))
        except (OSError, ValueError, KeyError) as error:
            raise orbax_files.damaged(path / part, error) from error
        if problem := _misfit(_wanted(part, config), flat[part]):
            raise UserError(f"{path / part} does not fit config.json: {problem}.")
    tokenizer = path / "tokenizer"
    scheduler = read_json(path / "scheduler_config.json")
    return config, flat, tokenizer if tokenizer.is_dir() else None, scheduler


def _config_problem(config: Mapping[str, Any]) -> str:
    lacking = [key for key in REQUIRED if key not in config]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    sizes = config.get("transformer")
    return sources.selection_problem(config, sizes and WanConfig.from_dict(sizes).num_layers)


def _wanted(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by flat name of what is on disk: feature maps of the linear layers only."""
    linear = {str(layer) for layer in config["linear_layers"]}
    shapes = flat_shapes(part, model_configs(config)[part])
    return {
        name: shape
        for name, shape in shapes.items()
        if FEATURE_MAP not in name or name.split(".")[1] in linear
    }


def _misfit(wanted: Mapping[str, tuple[int, ...]], flat: Flat) -> str:
    """What differs between the shapes wanted and the arrays there; empty if nothing does."""
    kinds = {
        "missing": wanted.keys() - flat.keys(),
        "unknown": flat.keys() - wanted.keys(),
        "of another shape": [n for n in wanted.keys() & flat.keys() if flat[n].shape != wanted[n]],
    }
    return "; ".join(f"{kind}: {importer.grouped(names)}" for kind, names in kinds.items() if names)


def _stored(part: str, config: Mapping[str, Any], flat: Flat, dtype: str | None) -> Flat:
    wanted = _wanted(part, config)
    flat = {name: a for name, a in flat.items() if name in wanted or FEATURE_MAP not in name}
    if problem := _misfit(wanted, flat):
        raise ValueError(f"{part} does not fit the config: {problem}.")
    return cast(flat, dtype)


def _summary(flat: Flat) -> dict[str, Any]:
    dtypes = sorted({str(array.dtype) for array in flat.values()})
    return {"parameters": sum(array.size for array in flat.values()), "dtypes": dtypes}
