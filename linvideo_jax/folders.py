"""Folders and files that are written whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linvideo_jax.errors import UserError


def user_cache() -> Path:
    """Where this package keeps what it can make again; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linvideo_jax"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it at the end, and vanishes on an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_writable(folder: Path, flag: str) -> None:
    """UserError that names `flag` if `folder` cannot be made and written to; nothing is created."""
    if re.match(r"\w+:/", str(folder)):
        raise UserError(
            f"{folder} is no folder of this machine: give one that is mounted here as {flag}."
        )
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"the folder {folder} cannot be written: choose another {flag}.")


def check_space(folder: Path, size: int) -> None:
    """UserError if the disk of `folder`, which need not be there yet, has fewer bytes free."""
    existing = _existing(folder)
    disk = shutil.disk_usage(existing)
    if disk.free < size and disk.total > 0:  # some mounts do not say how large they are
        needed, free = f"{size / 1e9:,.1f} GB", f"{disk.free / 1e9:,.1f} GB"
        raise UserError(
            f"{folder} needs {needed}, but its disk has {free} free: "
            "make room, or choose another folder."
        )


def _beside(folder: Path, suffix: str) -> Path:
    return folder.parent / f".{folder.name}.{suffix}"


def recover(folder: Path) -> None:
    """Puts the old folder back if a writer was killed between the two renames of `replaced`."""
    folder = folder.resolve()
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextmanager
def replaced(folder: Path, marker: str | None = None) -> Iterator[Path]:
    """Yields an empty folder beside `folder` that takes its name when the block ends without error.

    Killed at any moment, `folder` is what it was, or complete (`recover` sees to the moment between
    the two renames). A folder that is not empty is only replaced if it holds the file `marker`, so
    that a mistyped path costs nobody their files. UserError if the place cannot be written.
    """
    folder = folder.resolve()
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        recover(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another folder to write to.")
        ours = marker is not None and (folder / marker).exists()
        if folder.exists() and any(folder.iterdir()) and not ours:
            raise UserError(f"{folder} exists and holds other files; choose a new or empty folder.")
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
