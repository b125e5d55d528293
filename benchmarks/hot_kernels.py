"""Where the time of a compiled program goes: kernels and named scopes, by JAX's profiler."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from linvideo_jax.plan.collectives import KINDS

# The models' named scopes; the innermost that an operation stands in counts.
SCOPES = {
    "queries_keys_values",
    "softmax",
    "linear",
    "mix",
    "cross_attention",
    "feed_forward",
    "self_attention",
    "patch_embedding",
    "time_embedding",
    "text_embedding",
    "text_keys",
    "head",
    "vae_decode",
    "text_encoder",
}
NO_SCOPE = "norms, modulation and the rest"


def profile(run: Callable[[], Any], program: str, top: int = 15) -> dict[str, Any]:
    """Milliseconds of the `top` kernels of one run(), and of each named scope.

    program: the text of what runs, `compiled.as_text()`.
    """
    run()
    kernels, scopes = _totals(_traced(run), scopes_of(program))
    total = sum(kernels.values())
    return {
        "milliseconds": total,
        "kernels": [
            {"name": name, "milliseconds": ms, "share": ms / total}
            for name, ms in kernels.most_common(top)
        ],
        "scopes": dict(scopes.most_common()),
    }


def collectives(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Of each GPU during one run(): milliseconds in which a collective runs, and runs alone.

    A collective waits for the other GPUs in its kernel: the GPU that comes last tells what the
    exchange takes. kernels: milliseconds by name. Empty where the profiler sees no GPU.
    """
    found = []
    for plane in _gpus(_traced(run)):
        exchange, other, names = [], [], Counter()
        for name, operation, start, length in _kernels(plane):
            if "nccl" in name.lower() or operation.startswith(KINDS):
                exchange.append((start, start + length))
                names[name] += length / 1e6
            else:
                other.append((start, start + length))
        busy = covered(exchange + other)
        found.append(
            {
                "milliseconds": covered(exchange) / 1e6,
                "alone_milliseconds": (busy - covered(other)) / 1e6,
                "busy_milliseconds": busy / 1e6,
                "kernels": dict(names.most_common(6)),
            }
        )
    return found


def covered(intervals: Iterable[Sequence[float]]) -> float:
    """Length of the union of (start, end)."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def scopes_of(program: str) -> dict[str, str]:
    """The named scope of each of XLA's instructions."""
    found = re.findall(r'%?([\w.-]+) = [^\n]*op_name="([^"]*)"', program)
    return {
        name: next((part for part in reversed(path.split("/")) if part in SCOPES), NO_SCOPE)
        for name, path in found
    }


def _traced(run: Callable[[], Any]) -> Any:
    """What the profiler saw of one run()."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_file(str(path))


def _gpus(data: Any) -> list[Any]:
    return [plane for plane in data.planes if plane.name.startswith("/device:GPU")]


def _kernels(plane: Any) -> Iterator[tuple[str, str, float, float]]:
    """`_events` of a GPU's streams; its other lines are the same again, by module and by source."""
    return _events(line for line in plane.lines if line.name.startswith("Stream"))


def _events(lines: Iterable[Any]) -> Iterator[tuple[str, str, float, float]]:
    """(name, XLA's instruction, start and length in ns)."""
    for line in lines:
        for event in line.events:
            stats = {key: value for key, value in event.stats if key is not None}
            yield event.name, str(stats.get("hlo_op", "")), event.start_ns, event.duration_ns


def _totals(data: Any, scope_of: Mapping[str, str]) -> tuple[Counter, Counter]:
    """Milliseconds by kernel and by scope: of a GPU's streams, or of a CPU's operations."""
    kernels, scopes = Counter(), Counter()
    gpus = _gpus(data)
    events = _kernels(gpus[0]) if gpus else _events(x for plane in data.planes for x in plane.lines)
    for name, operation, _, length in events:
        if not gpus and (not operation or operation.startswith(("while", "call", "cond"))):
            continue  # threads wait in other events, and these hold others
        kernels[name] += length / 1e6
        scopes[scope_of.get(operation, NO_SCOPE)] += length / 1e6
    return kernels, scopes
