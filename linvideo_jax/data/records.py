"""Files of records (ArrayRecord), each written whole or not at all, with a checksum beside it.

`NAME.arrayrecord` has `NAME.json` with its size and CRC-32, written after it: a file without one
was never finished. One that was changed after its checksum was taken is read whole and compared.
Paths may be of a bucket (`gs://...`), which etils and ArrayRecord open.
"""

import contextlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing

# One record a chunk, so that each is read alone; bfloat16 of noise does not compress.
_OPTIONS = "group_size:1,uncompressed"


def is_local(path: epath.Path) -> bool:
    """Whether a path is of a mounted disk."""
    return "://" not in os.fspath(path)


def checksum_path(path: epath.Path) -> epath.Path:
    """Where size and checksum of a file lie."""
    return path.with_suffix(".json")


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[Path]:
    """A local file that takes the place of `path` at the end, and vanishes on an error."""
    if is_local(path):
        with replacing(Path(path)) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            epath.Path(temporary).copy(path, overwrite=True)


def write(path: epath.Path, records: Iterable[bytes], **told: Any) -> None:
    """Writes records and then their checksum, with `told` beside it.

    UserError with the system's word if the disk refuses; what was there before is kept.
    """
    try:
        with writing(path) as temporary:
            writer, written = ArrayRecordWriter(str(temporary), _OPTIONS), 0
            try:
                for record in records:
                    writer.write(record)
                    written += 1
            finally:
                writer.close()
            entry = {"records": written, "bytes": temporary.stat().st_size}
            entry |= {"crc32": _crc32(temporary), **told}
            checksum_path(path).unlink(missing_ok=True)
        with writing(checksum_path(path)) as temporary:
            temporary.write_text(json.dumps(entry) + "\n")
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter
        raise UserError(
            f"{path} cannot be written ({_reason(error)}): make room or choose another folder and "
            "run again; what is finished is kept."
        ) from error


def count(path: epath.Path) -> int:
    """How many records a file has, 0 if it is not there as it was written."""
    return json.loads(checksum_path(path).read_text())["records"] if intact(path) else 0


def intact(path: epath.Path) -> bool:
    """Whether a file is there as it was written."""
    try:
        entry = json.loads(checksum_path(path).read_text())
        if path.stat().length != entry["bytes"]:
            return False
        if _modified(path) <= _modified(checksum_path(path)):
            return True
        if _crc32(path) != entry["crc32"]:
            return False
        with writing(checksum_path(path)) as temporary:
            temporary.write_text(json.dumps(entry) + "\n")
    except (OSError, ValueError, KeyError):
        return False
    return True


class Reader:
    """Random access to the records of some files, one after the other, from any thread.

    count: the records of each file.
    """

    def __init__(self, paths: Sequence[epath.Path], count: int):
        self._paths, self._count = paths, count
        # With a slice given, no file is opened before it is read from.
        self._source = ArrayRecordDataSource([f"{os.fspath(path)}[0:{count}]" for path in paths])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> bytes:
        """A record; UserError that names its file if that cannot be read."""
        try:
            return self._source[position]
        except (RuntimeError, IndexError) as error:
            path = self._paths[position // self._count]
            _suspect(path)
            raise UserError(
                f"{path} is damaged or missing: run the collect stage again, which makes it anew."
            ) from error


def _suspect(path: epath.Path) -> None:
    """Marks a file as changed, so that `intact` reads it whole."""
    if is_local(path):
        with contextlib.suppress(OSError):
            os.utime(path)


def _modified(path: epath.Path) -> int:
    return os.stat(path).st_mtime_ns if is_local(path) else path.stat().mtime


def _crc32(path: Path | epath.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _reason(error: Exception) -> str:
    """The system's word in an error of Python's or in one of ArrayRecord's long messages."""
    found = re.search(r"failed: ([^;]+)", str(error))
    return found[1] if found else getattr(error, "strerror", None) or str(error)
