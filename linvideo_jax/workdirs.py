"""The folder of a run: for one process at a time, and for one configuration."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linvideo_jax import folders, loop
from linvideo_jax.errors import UserError

# What may differ when a run goes on: groups, fields of any group, and fields at the top. They
# change no state that training makes, or, like remat, its rounding alone. What evaluate and profile
# keep is kept beside a fingerprint of its settings.
GROUPS = ("evaluate", "profile", "mesh")
FIELDS = (
    "best",
    "divergence_factor",
    "divergence_steps",
    "final_weights",
    "keep",
    "log_every",
    "profile_at",
    "remat",
    "report_every",
    "sample_every",
    "sample_prompts",
    "save_every",
)
TOP = ("stages", "sweep", "sweep_rows", "sweep_seeds")


class Busy(UserError):
    """Another process is at work in a folder."""


@contextlib.contextmanager
def held(folder: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Makes `folder` if need be and holds the lock `name` in it, or raises Busy.

    The lock is the process's own: it ends with it, however that ends. wait: until it is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            works = f"process {file.read().strip() or 'unknown'} is at work in {folder}"
            if not wait:
                what = "wait until it ends, or choose another --workdir."
                raise Busy(f"{works}: {what}") from None
            print(f"Waiting: {works}.", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def claimed(workdir: Path, config: Any, wait: bool = False) -> Iterator[None]:
    """Holds `workdir` (`held`), and notes `config` in `config.json` at the first time.

    UserError, with nothing written, if another process holds it or if the configuration is another
    one than the first time (`GROUPS`, `FIELDS` and `TOP` aside), naming a field that differs.
    """
    workdir = Path(workdir)
    folders.check_writable(workdir, "--workdir")
    with held(workdir, ".lock", wait):
        _same(workdir, config)
        yield


def _same(workdir: Path, config: Any) -> None:
    path = workdir / "config.json"
    now = json.loads(json.dumps(config.to_dict(), default=str))
    if not path.exists():
        loop.write_json(path, now)
        return
    there, here = _flat(loop.read_json(path)), _flat(now)
    changed = [
        name
        for name in dict.fromkeys([*there, *here])
        if not _may_change(name) and there.get(name, "missing") != here.get(name, "missing")
    ]
    if changed:
        name, *rest = changed
        before, after = (repr(values.get(name, "missing")) for values in (there, here))
        others = f", and so do {', '.join(rest)}" if rest else ""
        raise UserError(
            f"{workdir} is of another configuration, {name} differs: {before} there, {after} "
            f"now{others}: choose another --workdir."
        )


def _may_change(name: str) -> bool:
    keys = name.split(".")
    return keys[0] in (*GROUPS, *TOP) or (len(keys) > 1 and keys[-1] in FIELDS)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
