"""What the benchmarks of true size share: medians, memory peaks, and results written at once."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linvideo_jax import compiled_programs, loop
from linvideo_jax.errors import UserError
from linvideo_jax.models.module import Params, shapes

# Read when JAX first asks for devices. PyTorch shares the GPU in some parts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")

GIB = 2**30
_CHILD = "LINVIDEO_BENCHMARK_PART"  # set where another process of the benchmark shows the whole
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "tokamax")
PACKAGES += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
NCCL = ("NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_ALGO", "NCCL_PROTO")


def environment() -> dict[str, Any]:
    """Where a figure was measured: device, versions, and what was set from outside."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "nccl": {name: os.environ[name] for name in NCCL if name in os.environ},
    }


def read(path: Path) -> dict[str, Any]:
    """A file that `Results` wrote; UserError if it is not one."""
    result = loop.read_json(path)
    if not isinstance(result, dict) or not {"environment", "small", "parts"} <= result.keys():
        raise UserError(f"{path} is no result of these benchmarks: choose another file.")
    return result


class Results:
    """A JSON file of {part: figures}, written after every part; one device and size a file."""

    def __init__(self, path: Path, small: bool):
        self._path = path
        self._all = {"environment": environment(), "small": small, "parts": {}}
        if path.exists():
            before = read(path)
            where = before["environment"]["device"], before["small"]
            if where != (self._all["environment"]["device"], small):
                raise UserError(f"{path} is of {where[0]} or another size: choose another --out.")
            self._all["parts"] = before["parts"]

    def __contains__(self, part: str) -> bool:
        return "error" not in self._all["parts"].get(part, {"error": ""})

    @property
    def everything(self) -> dict[str, Any]:
        """The file's content."""
        return self._all

    @property
    def parts(self) -> dict[str, Any]:
        """Figures by part; of one that failed, {"error": what}."""
        return self._all["parts"]

    def add(self, part: str, figures: Mapping[str, Any]) -> None:
        """Enters a part, with the flags of XLA that it ran under, and writes the file."""
        flags = os.environ.get("XLA_FLAGS")
        self._all["parts"][part] = dict(figures) | ({"xla_flags": flags} if flags else {})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        loop.write_json(self._path, self._all)


def run_parts(
    known: Mapping[str, Callable[[], dict[str, Any]]],
    wanted: Sequence[str],
    results: Results,
    command: Sequence[str],
) -> None:
    """Runs parts that have no result yet, each in a process of its own: a clean device each time.

    command: of this program, to which `--parts=NAME` is added; one part alone is run here. A part
    that fails is recorded with its error, and the others go on; then SystemExit(1).
    """
    for part in wanted:
        if part not in known:
            raise UserError(f"--parts={part} is unknown; choose from {', '.join(known)}.")
    missing = [part for part in wanted if part not in results]
    for part in set(wanted) - set(missing):
        print(f"{part}: measured before")
    if len(wanted) > 1:
        child = os.environ | {_CHILD: "1"}
        codes = [subprocess.call([*command, f"--parts={part}"], env=child) for part in missing]
        if any(codes):
            raise SystemExit(1)
        return
    for part in missing:
        print(f"{part} ...", flush=True)
        compiled_programs.keep_on_disk()
        start = time.perf_counter()
        try:
            figures = known[part]()
        except Exception as error:  # running out of memory among them
            traceback.print_exc()
            results.add(part, {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            raise SystemExit(1) from error
        figures["part_seconds"] = time.perf_counter() - start
        results.add(part, figures)
        print(json.dumps({part: figures}), flush=True)


def is_part() -> bool:
    """Whether this process does one part for another, which shows the results."""
    return _CHILD in os.environ


def device_bytes(key: str = "bytes_in_use") -> int:
    """Of JAX's arrays on the first device; 0 on a CPU, which does not count them."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get(key, 0))


class Stage:
    """`with stages("decode"):` seconds of a stage and the device's largest use during it.

    JAX's own peak is of the whole process: where a stage raises it, it is the stage's, and exact.
    Else the use was looked at every 2 ms ("sampled").
    """

    def __init__(self):
        self.figures: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> "Stage":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._before, self._seen, self._ended = device_bytes("peak_bytes_in_use"), 0, False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()

    def _look(self) -> None:
        while not self._ended:
            self._seen = max(self._seen, device_bytes())
            time.sleep(0.002)

    def __exit__(self, kind, value, trace) -> None:
        seconds = time.perf_counter() - self._start
        self._ended = True
        self._thread.join()
        peak = device_bytes("peak_bytes_in_use")
        exact = peak > self._before
        self.figures[self._name] = {
            "seconds": seconds,
            "peak_bytes": peak if exact else self._seen,
            "peak_is": "exact" if exact else "sampled",
        }
        print(f"  {self._name}: {seconds:.2f} s, {self._seen / GIB:.2f} GiB", flush=True)


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True
) -> dict[str, dict[str, Any]]:
    """Times every run in every round, after one to warm up; `run()` returns when it is done."""
    for run in runs.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(times) for name, times in seconds.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread."""
    return {
        "seconds": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "runs": len(seconds),
    }


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory of a program: arguments, results and what it needs meanwhile."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def ready(run: Callable[..., Any], *inputs: Any) -> Any:
    """run(*inputs) when it is done."""
    return jax.block_until_ready(run(*inputs))


def gpu_state() -> dict[str, float]:
    """Clock in MHz, power in W, temperature in C of JAX's first GPU now; {} where none is seen."""
    names = {"clock": "clocks.sm", "power": "power.draw", "temperature": "temperature.gpu"}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(names.values())}"]
    try:
        told = subprocess.check_output([*command, "--format=csv,noheader,nounits"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, map(float, told.split(",")), strict=True))


def relative_error(ours: Any, theirs: Any) -> float:
    """Distance of two arrays, relative to the norm of the second one."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def within(peak: int, goal: int) -> bool | None:
    """None on a device that does not count its memory."""
    return peak <= goal if peak else None


def random_params(module: type, config: Any, dtype: Any) -> Params:
    """Normal parameters with an initial model's scale, made on the device.

    The layers' matrices and embeddings are in `dtype` as `turns.Turns` gives them, the rest in
    float32.
    """

    def make(path, leaf, key):
        names = [str(p.key) for p in path]
        large = names[-1] == "embedding" or (names[0], names[-1]) == ("blocks", "kernel")
        if names[-1] == "scale":
            return jnp.ones(leaf.shape)
        layers = leaf.shape[:1] if names[0] == "blocks" else ()
        shape = leaf.shape[len(layers) :]
        scale = 0.02 if names[-1] == "bias" else max(float(np.prod(shape[:-1])), 1.0) ** -0.5
        return _normal(key, layers, shape, jnp.dtype(dtype if large else jnp.float32), scale)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(module, config))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    return jax.tree.unflatten(
        tree, [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, layers, shape, dtype, scale):
    """Layer after layer: all random bits at once would take more memory than the model."""

    def make(key):
        return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)

    return jax.lax.map(make, jax.random.split(key, layers)) if layers else make(key)


def command(file: str, argv: Sequence[str]) -> list[str]:
    """This program with its flags, without those that choose parts."""
    words = (word for word in argv[1:] if not word.startswith(("--parts", "--scaling")))
    return [sys.executable, file, *words]


def with_flags(words: str) -> dict[str, str]:
    """The environment with more flags for XLA, and without programs that others compiled."""
    given = os.environ.get("XLA_FLAGS", "")
    return {**os.environ, "XLA_FLAGS": f"{given} {words}".strip(), "JAX_COMPILATION_CACHE_DIR": ""}
