"""Where the time of a compiled program goes: kernels and named scopes, by JAX's profiler."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

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
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        kernels, scopes = _totals(data, scopes_of(program))
    total = sum(kernels.values())
    return {
        "milliseconds": total,
        "kernels": [
            {"name": name, "milliseconds": ms, "share": ms / total}
            for name, ms in kernels.most_common(top)
        ],
        "scopes": dict(scopes.most_common()),
    }


def scopes_of(program: str) -> dict[str, str]:
    """The named scope of each of XLA's instructions."""
    found = re.findall(r'%?([\w.-]+) = [^\n]*op_name="([^"]*)"', program)
    return {
        name: next((part for part in reversed(path.split("/")) if part in SCOPES), NO_SCOPE)
        for name, path in found
    }


def _totals(data: Any, scope_of: Mapping[str, str]) -> tuple[Counter, Counter]:
    """Milliseconds by kernel and by scope: of a GPU's streams, or of a CPU's operations."""
    kernels, scopes = Counter(), Counter()
    gpus = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus[:1] or data.planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # the same again, by module and by source
            for event in line.events:
                stats = {key: value for key, value in event.stats if key is not None}
                operation = str(stats.get("hlo_op", ""))
                if not gpus and (not operation or operation.startswith(("while", "call", "cond"))):
                    continue  # threads wait in other events, and these hold others
                milliseconds = event.duration_ns / 1e6
                kernels[event.name] += milliseconds
                scopes[scope_of.get(operation, NO_SCOPE)] += milliseconds
    return kernels, scopes
