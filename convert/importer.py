"""Reads a folder in diffusers' layout, or one with a transformer alone, without PyTorch."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.keys import ALIASES, Entry, torch_entries
from convert.tensors import DTYPES, TensorFiles, read_json
from linvideo_jax.errors import UserError
from linvideo_jax.parts import FEATURE_MAP, PARTS, Flat, flat_shapes

# File stem and class of each part, as diffusers and transformers write them.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
FEATURE_MAPS = "linvideo"
CLASSES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
SAMPLERS = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++",
}

# The sampling defaults of diffusers' WanPipeline, with the flow shift of its 480p checkpoints. A
# negative prompt of None is the one that the model was published with (`registry`).
SAMPLING = {
    "sampler": "unipc",
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "flow_shift": 3.0,
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "time_grid": "diffusers",
    "negative_prompt": None,
}


@dataclass(frozen=True)
class Source:
    """What a folder holds.

    kind: "diffusers" or "transformer"; folders: of each part; models: configuration of each part;
    config: linear_layers, feature_map and the sampling defaults; feature_maps: the folder of
    `linvideo.safetensors`, or None.
    """

    path: Path
    kind: str
    folders: dict[str, Path]
    models: dict[str, Any]
    config: dict[str, Any]
    tokenizer: Path | None
    scheduler: dict[str, Any]
    feature_maps: Path | None


def kind_of(folder: Path) -> str | None:
    """ "diffusers", "transformer" (a transformer-only folder that names its base), or None."""
    if (folder / "model_index.json").exists():
        return "diffusers"
    if (folder / "transformer").is_dir() and (folder / "config.json").exists():
        return "transformer" if "base" in read_json(folder / "config.json") else None
    return None


def find(folder: Path | str, parts: Iterable[str] = tuple(PARTS)) -> Source:
    """Recognises a folder and reads its configurations.

    A transformer-only folder takes what it lacks from the diffusers folder that is its `base`.
    config.json beside model_index.json is optional and may say more than diffusers' files can.
    UserError if it is neither, or holds another model than Wan2.1's text-to-video.
    """
    path = Path(folder)
    kind = kind_of(path)
    if kind is None:
        found = "is not there" if not path.exists() else "has neither model_index.json nor a `base`"
        raise UserError(
            f"{path} {found}: name a folder in diffusers' layout, or a transformer-only folder."
        )
    own = read_json(path / "config.json") if (path / "config.json").exists() else {}
    base = path
    if kind == "transformer":
        base = path / str(own["base"])
        if kind_of(base) != "diffusers":
            raise UserError(
                f"{path / 'config.json'} names {own['base']!r} as base, but {base} is not a folder "
                "in diffusers' layout."
            )
    _check_pipeline(base / "model_index.json")
    scheduler = read_json(base / "scheduler" / "scheduler_config.json")
    config = _settings(own, scheduler)
    folders = {part: (path if part == "transformer" else base) / part for part in parts}
    models = {part: _model(part, folder) for part, folder in folders.items()}
    transformer = models.get("transformer")
    if problem := selection_problem(config, transformer and transformer.num_layers):
        raise UserError(f"{path / 'config.json'} cannot be used: {problem}.")
    if transformer:
        models["transformer"] = replace(transformer, feature_map=config["feature_map"])
    tokenizer = base / "tokenizer"
    has_maps = (path / f"{FEATURE_MAPS}.safetensors").exists()
    return Source(
        path=path,
        kind=kind,
        folders=folders,
        models=models,
        config=config,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        scheduler=scheduler,
        feature_maps=path if config["linear_layers"] or has_maps else None,
    )


def _check_pipeline(path: Path) -> None:
    index = read_json(path)
    name = index.get("_class_name")
    if name != "WanPipeline" or (index.get("transformer_2") or [None])[0]:
        what = name if name != "WanPipeline" else "a Wan2.2 pipeline of two transformers"
        raise UserError(
            f"{path} is of {what}: only Wan2.1 text-to-video (WanPipeline) is supported."
        )


def _settings(own: dict, scheduler: dict) -> dict[str, Any]:
    settings = dict(SAMPLING)
    if scheduler.get("_class_name") in SAMPLERS:
        settings["sampler"] = SAMPLERS[scheduler["_class_name"]]
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if shift is not None:
        settings["flow_shift"] = float(shift)
    settings |= {key: own[key] for key in SAMPLING if key in own}
    return {
        **settings,
        "linear_layers": own.get("linear_layers", []),
        "feature_map": own.get("feature_map"),
    }


def selection_problem(config: Mapping[str, Any], num_layers: int | None) -> str:
    """What is wrong with `linear_layers` and `feature_map` of a config.json; empty if nothing is.

    num_layers: of the transformer, None if its configuration is not at hand.
    """
    layers, feature_map = config["linear_layers"], config["feature_map"]
    if feature_map not in (None, "hedgehog"):
        return f"feature_map is {feature_map!r}; it must be null or 'hedgehog'"
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        return "linear_layers must be a list of layer numbers"
    if layers != sorted(set(layers)):
        return "linear_layers must be sorted, each layer once"
    if layers and feature_map is None:
        return "linear_layers need a feature_map"
    if layers and num_layers is not None and not 0 <= layers[0] <= layers[-1] < num_layers:
        return f"linear_layers must be from 0 to {num_layers - 1}"
    return ""


def _model(part: str, folder: Path) -> Any:
    config = read_json(folder / "config.json")
    names = config.get("architectures") or [config.get("_class_name", CLASSES[part])]
    if CLASSES[part] not in names:
        raise UserError(f"{folder / 'config.json'} is of {names[0]}, not of {CLASSES[part]}.")
    return PARTS[part].config.from_dict(config)


def read(source: Source, parts: Iterable[str] | None = None) -> dict[str, Flat]:
    """Every parameter of the parts, by flat name, in the dtype in which it is stored.

    Feature maps only of the linear layers. Raises one UserError with every key that is unknown,
    missing, in two files, of the wrong shape or of a dtype that is not read, before reading any.
    """
    plans, problems = {}, []
    for part in parts or source.folders:
        entries = torch_entries(part, flat_shapes(part, source.models[part]))
        maps = {key: entry for key, entry in entries.items() if FEATURE_MAP in key}
        plain = {key: entry for key, entry in entries.items() if key not in maps}
        sources = [(plain, source.folders[part], STEMS[part])]
        if part == "transformer" and source.feature_maps:
            linear = {str(layer) for layer in source.config["linear_layers"]}
            maps = {key: entry for key, entry in maps.items() if key.split(".")[1] in linear}
            sources.append((maps, source.feature_maps, FEATURE_MAPS))
        plans[part] = []
        for wanted, folder, stem in sources:
            files = TensorFiles(folder, stem)
            located, found = _compare(wanted, files)
            if found:
                problems.append(f"{folder / stem}.safetensors:\n" + "\n".join(found))
            plans[part].append((located, files))
    if problems:
        raise UserError(
            f"{source.path} does not fit its configuration; nothing was written.\n"
            + "\n".join(problems)
        )
    return {
        part: {
            entry.ours: entry.transform.to_ours(files.read(key))
            for located, files in plan
            for key, entry in located.items()
        }
        for part, plan in plans.items()
    }


def _compare(wanted: dict[str, Entry], files: TensorFiles) -> tuple[dict[str, Entry], list[str]]:
    """The entries under the keys that the file uses, and what is wrong, one line a kind."""
    located = {}
    unknown, unequal, shape, dtype = [], [], defaultdict(list), defaultdict(list)
    for key in files.shapes:
        name = ALIASES[key] if ALIASES.get(key) in wanted else key
        if name not in wanted:
            unknown.append(key)
            continue
        if name == key or name not in files.shapes:
            located[key] = wanted[name]
        if files.shapes[key] != wanted[name].shape:
            shape[files.shapes[key], wanted[name].shape].append(key)
        if files.dtypes[key] not in DTYPES:
            dtype[files.dtypes[key]].append(key)
        elif name != key and name in files.shapes and not files.equal(name, key):
            unequal.append(f"{key} and {name}")
    missing = set(wanted) - {ALIASES.get(key, key) for key in files.shapes} - set(files.shapes)
    lines = []
    if unknown:
        lines.append(f"  unknown: {grouped(unknown)}")
    if missing:
        lines.append(f"  missing: {grouped(missing)}")
    for (has, needs), keys in shape.items():
        lines.append(f"  wrong shape {list(has)} instead of {list(needs)}: {grouped(keys)}")
    for name, keys in dtype.items():
        lines.append(f"  dtype {name}, not one of {', '.join(DTYPES)}: {grouped(keys)}")
    if unequal:
        lines.append(f"  differ, but must be one array: {', '.join(unequal)}")
    if files.duplicates:
        lines.append(f"  in two files: {grouped(files.duplicates)}")
    return located, lines


def grouped(keys: Iterable[str]) -> str:
    """Keys in one line; of those that differ in their first number alone a range: `a.{0-3,5}.b`."""
    groups = defaultdict(list)
    for key in keys:
        numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", key)
        head, number, tail = numbered.groups() if numbered else (key, None, "")
        groups[head, tail].append(number if number is None else int(number))
    texts = []
    for (head, tail), numbers in sorted(groups.items()):
        texts.append(head + ("" if numbers == [None] else _ranges(sorted(numbers))) + tail)
    return ", ".join(texts)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"
