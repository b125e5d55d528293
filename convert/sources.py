"""Recognises what a checkpoint of PyTorch's world is, and where its parts are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import pickles, sizes, variants
from convert.float8 import Widened
from convert.pickles import PickleFile
from convert.spelling import IGNORED, recognise
from convert.tensors import TensorFiles, Tensors, read_json
from linvideo_jax.errors import UserError
from linvideo_jax.models import wan_config
from linvideo_jax.parts import PARTS

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

# The original repository's files.
ORIGINAL_T5 = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_VAE = "Wan2.1_VAE.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"

# The sampling defaults of diffusers' WanPipeline, with the flow shift of its 480p checkpoints. A
# negative prompt of None is the one that the model was published with (`registry`);
# denoising_steps is the list of a model that was distilled to a few steps.
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
    "denoising_steps": None,
}
# What the original's generate.py does unless told otherwise.
ORIGINAL_SAMPLING = {**SAMPLING, "flow_shift": 5.0, "time_grid": "original"}


@dataclass(frozen=True)
class PartSource:
    """A part's configuration, its tensors, and diffusers' name of each of their keys."""

    model: Any
    files: Tensors
    names: Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """What a path holds.

    description: what kind of source it is, in words; config: linear_layers, feature_map and the
    sampling defaults; feature_maps: `linvideo.safetensors`, or None.
    """

    path: Path
    description: str
    parts: dict[str, PartSource]
    config: dict[str, Any]
    tokenizer: Path | None = None
    scheduler: dict[str, Any] | None = None
    feature_maps: Tensors | None = None

    @property
    def models(self) -> dict[str, Any]:
        """Configuration of each part."""
        return {part: source.model for part, source in self.parts.items()}


def kind_of(folder: Path) -> str | None:
    """ "diffusers", "transformer" (a transformer-only folder that names its base), or None."""
    if (folder / "model_index.json").exists():
        return "diffusers"
    if (folder / "transformer").is_dir() and (folder / "config.json").exists():
        return "transformer" if "base" in read_json(folder / "config.json") else None
    return None


def find(path: Path | str, parts: Iterable[str] | None = None) -> Source:
    """Recognises a file or folder and reads its configurations, or derives them from shapes.

    parts: those wanted of a folder that has all (`kind_of`), None for every one; of others all that
    is there is found. UserError if it is nothing known, lacks a part, or holds another model than
    Wan2.1's text-to-video.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there: name a folder, a file or a Hugging Face repository.")
    if kind_of(path):
        return _complete(path, tuple(PARTS if parts is None else parts))
    variants.check_name(path)
    return _single(path) if path.is_file() else _folder(path)


def _complete(path: Path, parts: Iterable[str]) -> Source:
    """A folder in diffusers' layout, or a transformer-only folder, whose base has the rest.

    config.json beside model_index.json is optional and may say more than diffusers' files can.
    """
    own = read_json(path / "config.json") if (path / "config.json").exists() else {}
    base, description = path, "a folder in diffusers' layout"
    if kind_of(path) == "transformer":
        base = path / str(own["base"])
        description = f"a transformer-only folder with its other parts in {base}"
        if kind_of(base) != "diffusers":
            raise UserError(
                f"{path / 'config.json'} names {own['base']!r} as base, but {base} is not a folder "
                "in diffusers' layout."
            )
    index = read_json(base / "model_index.json")
    folders = {part: (path if part == "transformer" else base) / part for part in parts}
    configs = {
        part: read_json(folder / "config.json")
        for part, folder in folders.items()
        if (folder / "config.json").exists()
    }
    variants.check_configs(base / "model_index.json", index, *configs.values())
    if index.get("_class_name") != "WanPipeline":
        raise variants.refuse(base / "model_index.json", f"of {index.get('_class_name')}")
    scheduler = read_json(base / "scheduler" / "scheduler_config.json")
    config = _settings(own, scheduler)
    has_maps = (path / f"{FEATURE_MAPS}.safetensors").exists()
    models = {part: _model(part, folder) for part, folder in folders.items()}
    transformer = models.get("transformer")
    if problem := selection_problem(config, transformer and transformer.num_layers):
        raise UserError(f"{path / 'config.json'} cannot be used: {problem}.")
    if transformer:
        models["transformer"] = replace(transformer, feature_map=config["feature_map"])
    maps = None
    if config["linear_layers"] or has_maps:
        maps = TensorFiles.of(path, FEATURE_MAPS)
    return Source(
        path=path,
        description=description,
        parts={part: _part_of_diffusers(part, folders[part], models[part]) for part in folders},
        config=config,
        tokenizer=base / "tokenizer" if (base / "tokenizer").is_dir() else None,
        scheduler=scheduler,
        feature_maps=maps,
    )


def _folder(path: Path) -> Source:
    """A folder of the original repository, one part of diffusers' layout, or some of them."""
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    variants.check_configs(path, config)
    for part in PARTS:
        if _class_of(config) == CLASSES[part]:
            model = PARTS[part].config.from_dict(config)
            parts = {part: _part_of_diffusers(part, path, model)}
            description = f"the {part} folder of diffusers' layout"
            return Source(path, description, parts, _settings({}, {}), _tokenizer(path.parent))
    folders = {part: path / part for part in PARTS if (path / part / "config.json").exists()}
    if folders:
        found = {part: read_json(folder / "config.json") for part, folder in folders.items()}
        variants.check_configs(path, *found.values())
        parts = {
            part: _part_of_diffusers(part, folder, _model(part, folder))
            for part, folder in folders.items()
        }
        description = f"part of a folder in diffusers' layout ({', '.join(parts)})"
        return Source(path, description, parts, _settings({}, {}), _tokenizer(path))
    return _original(path, config)


def _original(path: Path, config: Mapping[str, Any]) -> Source:
    parts = {}
    if any(path.glob(f"{STEMS['transformer']}*.safetensors*")):
        part, source, _ = _files_alone(TensorFiles.of(path, STEMS["transformer"]), config)
        parts[part] = source
    for name in (ORIGINAL_VAE, ORIGINAL_T5):
        if (path / name).exists():
            part, source, _ = _files_alone(PickleFile(path / name))
            parts[part] = source
    if not parts:
        raise UserError(
            f"{path} has neither model_index.json nor a `base`, nor files of the original "
            f"repository ({STEMS['transformer']}*.safetensors, {ORIGINAL_VAE}, {ORIGINAL_T5}): "
            "name a folder that has."
        )
    description = f"a folder in the original repository's layout ({', '.join(parts)})"
    settings = _settings(ORIGINAL_SAMPLING, {})
    return Source(path, description, parts, settings, _tokenizer(path))


def _single(path: Path) -> Source:
    if path.suffix == ".safetensors":
        files = TensorFiles([path], str(path))
    elif path.suffix in pickles.SUFFIXES:
        files = PickleFile(path)
    else:
        raise UserError(f"{path} is neither .safetensors nor {', '.join(pickles.SUFFIXES)}.")
    beside = path.parent / "config.json"
    config = read_json(beside) if beside.exists() else {}
    part, source, description = _files_alone(files, config)
    description = f"a single file: {description}"
    settings = _settings(ORIGINAL_SAMPLING, {})
    return Source(path, description, {part: source}, settings)


def _files_alone(
    files: Tensors, config: Mapping[str, Any] | None = None
) -> tuple[str, PartSource, str]:
    """(part, its source, description) of files whose keys alone tell what they are.

    config: a config.json beside them, the original repository's or diffusers'.
    """
    spelling = recognise(files.shapes)
    variants.check_tensors(files.where, spelling.part if spelling else "", files.shapes)
    if spelling is None:
        some = ", ".join(sorted(files.shapes)[:3])
        raise UserError(f"{files.where} has keys of no part of Wan2.1 ({some}, ...).")
    part = spelling.part
    narrow = Widened(files)
    names = _names(narrow, spelling)
    shapes = {names[key]: shape for key, shape in narrow.shapes.items() if key in names}
    if part == "transformer" and config:
        variants.check_configs(Path(files.where), config)
    if config and _class_of(config) == CLASSES[part]:
        model = PARTS[part].config.from_dict(config)
    else:
        is_original = part == "transformer" and "num_heads" in (config or {})
        model = sizes.derive(part, shapes, files.where, config if is_original else None)
    description = f"{part} under {spelling.names} names"
    if spelling.prefix:
        description += f" with the prefix {spelling.prefix!r}"
    if narrow.narrow:
        description += ", scaled float8" if narrow.scaled else ", float8"
    return part, PartSource(model, narrow, names), description


def _part_of_diffusers(part: str, folder: Path, model: Any) -> PartSource:
    files = TensorFiles.of(folder, STEMS[part])
    variants.check_tensors(files.where, part, files.shapes)
    spelling, files = recognise(files.shapes), Widened(files)
    if spelling and (spelling.part, spelling.names) == (part, "original"):
        return PartSource(model, files, _names(files, spelling))
    return PartSource(model, files, {key: key for key in files.shapes})


def _names(files: Tensors, spelling) -> dict[str, str]:
    return spelling.translate(key for key in files.shapes if key not in IGNORED)


def _tokenizer(folder: Path) -> Path | None:
    for name in (ORIGINAL_TOKENIZER, "tokenizer"):
        if any((folder / name / file).exists() for file in ("tokenizer.json", "spiece.model")):
            return folder / name
    return None


def _class_of(config: Mapping[str, Any]) -> str | None:
    return (config.get("architectures") or [config.get("_class_name")])[0]


def _model(part: str, folder: Path) -> Any:
    config = read_json(folder / "config.json")
    name = _class_of(config) or CLASSES[part]
    if name != CLASSES[part]:
        raise UserError(f"{folder / 'config.json'} is of {name}, not of {CLASSES[part]}.")
    return PARTS[part].config.from_dict(config)


def _settings(own: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
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
    known = wan_config.FEATURE_MAPS
    if feature_map not in (None, *known):
        return f"feature_map is {feature_map!r}; it must be null or one of {', '.join(known)}"
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        return "linear_layers must be a list of layer numbers"
    if layers != sorted(set(layers)):
        return "linear_layers must be sorted, each layer once"
    if layers and feature_map is None:
        return "linear_layers need a feature_map"
    if layers and num_layers is not None and not 0 <= layers[0] <= layers[-1] < num_layers:
        return f"linear_layers must be from 0 to {num_layers - 1}"
    return ""
