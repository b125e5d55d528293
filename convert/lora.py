"""Low-rank and full differences (LoRA files for Wan), merged into the transformer's weights.

W + strength * alpha / rank * up @ down; alpha is the rank where the file has none.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert import original, variants
from convert.pickles import SUFFIXES, PickleFile
from convert.tensors import DTYPES, TensorFiles, Tensors
from linvideo_jax.errors import UserError

# What follows a module's name in a key, and what it is there.
_ROLES = {
    **dict.fromkeys(
        (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"),
        "down",
    ),
    **dict.fromkeys(
        (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"), "up"
    ),
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
}
_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
    *("lora_unet__", "lora_unet_", "lora_transformer_"),
)

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Lora:
    """A file and the strength with which it is merged."""

    path: Path
    strength: float

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """FILE:STRENGTH, or FILE for strength 1; UserError for anything else."""
        path, colon, strength = text.rpartition(":")
        try:
            lora = cls(Path(path), float(strength)) if colon else cls(Path(text), 1.0)
        except ValueError:
            raise UserError(f"--lora={text}: after the colon belongs a number.") from None
        if not np.isfinite(lora.strength):
            raise UserError(f"--lora={text}: the strength must be finite.")
        if not lora.path.is_file():
            raise UserError(f"--lora={text}: there is no file {lora.path}.")
        return lora

    def changes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
        """By diffusers' key of a weight: float32 weight in PyTorch's layout to the changed one.

        shapes: of all the transformer's weights. One UserError with every key of the file that
        matches none of them, or whose shape does not fit; or if it is of an image-to-video model.
        """
        is_pickle = self.path.suffix in SUFFIXES
        files = PickleFile(self.path) if is_pickle else TensorFiles([self.path], str(self.path))
        variants.check_tensors(self.path, "", files.shapes)
        modules, unknown = _by_module(files, _modules(shapes))
        changes, problems = {}, []
        for module, roles in modules.items():
            for key, change, problem in _changes_of(module, roles, files, self.strength, shapes):
                if problem:
                    problems.append(problem)
                else:
                    changes[key] = change
        if unknown:
            problems.append(f"match nothing: {', '.join(sorted(unknown))}")
        if not modules and not unknown:
            problems.append("it holds nothing")
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(f"{self.path} cannot be merged; nothing was written.{lines}")
        return changes


def _modules(keys: Iterable[str]) -> dict[str, str]:
    """Every spelling of a module's name to diffusers': dots may be underscores."""
    spellings = {}
    names = original.rename(original.TRANSFORMER, keys, to_original=True)
    for key in keys:
        for name in {key, names.get(key, key)}:
            module = key.removesuffix(".weight").removesuffix(".bias")
            spelled = name.removesuffix(".weight").removesuffix(".bias")
            spellings[spelled] = spellings[spelled.replace(".", "_")] = module
    for key in names:  # diff_m: the modulation of the block, or head, that is named
        if key.endswith("scale_shift_table"):
            spellings[names[key].removesuffix(".modulation")] = key
    return spellings


def _by_module(
    files: Tensors, spellings: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """diffusers' module to the file's key of each role, and the keys that match nothing."""
    modules, unknown = defaultdict(dict), []
    for key in files.shapes:
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        name = key.removesuffix(suffix or "")
        found = spellings.get(name)
        for prefix in _PREFIXES:
            found = found or spellings.get(name.removeprefix(prefix))
        if suffix is None or found is None or files.dtypes[key] not in DTYPES:
            unknown.append(key)
        else:
            modules[found][_ROLES[suffix]] = key
    return modules, unknown


def _changes_of(module, roles, files, strength, shapes):
    """(diffusers' key, change, problem) of everything that a file says of one module."""

    def value(role: str) -> np.ndarray:
        return files.read(roles[role]).astype(np.float32)

    def plus(role: str) -> Change:
        return lambda weight: weight + strength * value(role).reshape(weight.shape)

    weight = f"{module}.weight"
    for role, key in (("diff", weight), ("diff_b", f"{module}.bias"), ("diff_m", module)):
        if role in roles:
            fits = key in shapes and np.prod(files.shapes[roles[role]]) == np.prod(shapes[key])
            yield key, plus(role), "" if fits else f"does not fit {key}: {roles[role]}"
    if not {"up", "down", "alpha"} & roles.keys():
        return
    if not {"up", "down"} <= roles.keys():
        yield weight, None, f"{module} has only {', '.join(sorted(roles.values()))}"
        return
    (outputs, *_), (rank, *_) = files.shapes[roles["up"]], files.shapes[roles["down"]]
    up, down = (np.prod(files.shapes[roles[role]], dtype=int) for role in ("up", "down"))
    shape = shapes.get(weight)
    if shape is None or outputs != shape[0] or up != outputs * rank:
        yield weight, None, f"does not fit {weight}: {roles['up']}"
    elif down != rank * np.prod(shape[1:], dtype=int):
        yield weight, None, f"does not fit {weight}: {roles['down']}"
    else:

        def low_rank(weight: np.ndarray) -> np.ndarray:
            alpha = float(value("alpha").reshape(())) if "alpha" in roles else rank
            product = value("up").reshape(outputs, rank) @ value("down").reshape(rank, -1)
            return weight + np.float32(strength * alpha / rank) * product.reshape(weight.shape)

        yield weight, low_rank, ""
