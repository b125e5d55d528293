"""Pairs of the teacher's sampling trajectories: the data-free training set of the transfer.

A pair is (x_t, t, seed, prompt id, u_cond, u_neg): x_t moves by the guided velocity, u_cond and
u_neg are the teacher's velocities for the prompt and for the negative prompt, without guidance.

A folder of pairs holds

    index.json               what they are, the grid, and what they were made with (`Index`)
    text.arrayrecord         the embedding of each prompt, the negative one last, without pads
    pairs-00000.arrayrecord  whole trajectories in bfloat16, of `batch_size` videos

and a checksum beside each file of records (`records.py`). Row r is step r % steps of video
r // steps. Each of its arrays is a record of its own, so that a reader reads what it trains on and
no more; in front of x stand seed, prompt id and step.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import grain
import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float

from linvideo_jax.data import records
from linvideo_jax.data.texts import Texts
from linvideo_jax.errors import UserError

FIELDS = {"both": ("x", "u_cond", "u_neg"), "cond": ("x", "u_cond"), "none": ("x",)}
_TUPLES = ("sigmas", "latent_shape", "text_shape")  # of an Index; lists in JSON
_HEAD = struct.Struct("<qqq")  # seed, prompt id, step
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Head(NamedTuple):
    """Which pair it is; `step` is the index of t in the grid."""

    seed: int
    prompt: int
    step: int


@dataclass(frozen=True)
class Index:
    """What a collection is, stored or online.

    made: what it was made with, by name; sigmas: the grid, of steps + 1 numbers; latent_shape:
    [frames, height, width, channels]; text_shape: [tokens, text_dim] of the padded text;
    num_videos: 0 if online.
    """

    made: Mapping[str, Any]
    sigmas: tuple[float, ...]
    latent_shape: tuple[int, ...]
    num_videos: int
    num_prompts: int
    text_shape: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Pairs of one video."""
        return len(self.sigmas) - 1

    @property
    def sampler(self) -> str:
        """That made the trajectories."""
        return self.made["sampler"]

    @property
    def num_shards(self) -> int:
        """Files of pairs."""
        return -(-self.num_videos // self.made["batch_size"])

    @property
    def fields(self) -> tuple[str, ...]:
        """Arrays of a pair."""
        return FIELDS[self.made["store_velocity"]]

    @property
    def pair_bytes(self) -> int:
        """Of one pair on disk, but for the file's own, below a percent."""
        return _HEAD.size + len(self.fields) * 2 * int(np.prod(self.latent_shape))

    @property
    def shard_bytes(self) -> int:
        """Of one file of pairs."""
        return self.made["batch_size"] * self.steps * self.pair_bytes


class Trajectories(NamedTuple):
    """Whole trajectories of some videos, with what each was made from."""

    x: Float[np.ndarray, "steps videos frames height width channels"]
    u_cond: Float[np.ndarray, "steps videos frames height width channels"]
    u_neg: Float[np.ndarray, "steps videos frames height width channels"]
    prompt: Sequence[int]
    seed: Sequence[int]


def shard_path(folder: epath.Path, number: int) -> epath.Path:
    """Where a file of pairs lies."""
    return folder / f"pairs-{number:05d}.arrayrecord"


def text_path(folder: epath.Path) -> epath.Path:
    """Where the text embeddings lie."""
    return folder / "text.arrayrecord"


def write_index(folder: epath.Path, index: Index) -> None:
    """Writes index.json whole or not at all."""
    with records.writing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(asdict(index), indent=2) + "\n")


def read_index(folder: epath.Path) -> Index | None:
    """The index of a folder of pairs, None without one; UserError for one that is not ours."""
    path = folder / "index.json"
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        lists = {name: tuple(fields[name]) for name in _TUPLES}
        return Index(**fields | lists)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete it and run the collect stage again."
        ) from None


def differences(there: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str:
    """What of `names` differs in two collections' `made`, in words; empty if nothing does."""
    told, now = [], json.loads(json.dumps(now))  # as the other came back from a file
    for name in names:
        a, b = there.get(name), now[name]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = differences(a, b, sorted(b))
            told += [f"{name}.{inner}"] if inner else []
        elif a != b:
            told.append(f"{name} {_short(a)} there, {_short(b)} now")
    return "; ".join(told)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"


def write_shard(
    folder: epath.Path, number: int, index: Index, made: Trajectories, seconds: float
) -> None:
    """Writes whole trajectories as one file; seconds: what they took, for the estimate."""
    path = shard_path(folder, number)
    records.write(path, _records(index, made), seconds=round(seconds, 3))


def _records(index: Index, made: Trajectories) -> Iterator[bytes]:
    for video, (seed, prompt) in enumerate(zip(made.seed, made.prompt, strict=True)):
        for step in range(index.steps):
            for name in index.fields:
                head = _HEAD.pack(seed, prompt, step) if name == "x" else b""
                values = getattr(made, name)[step, video]
                yield head + values.astype(BFLOAT16, copy=False).tobytes()


class Pairs:
    """Random access to the pairs of a folder, or to those of a part of its videos."""

    num_threads = 2  # that read beside the updates; more contend for Python

    def __init__(self, folder: epath.Path, index: Index, videos: range | None = None):
        self.index = index
        self._folder = folder
        self._videos = range(index.num_videos) if videos is None else videos

    @cached_property
    def _records(self) -> records.Reader:
        index = self.index
        paths = [shard_path(self._folder, number) for number in range(index.num_shards)]
        return records.Reader(paths, index.made["batch_size"] * index.steps * len(index.fields))

    @cached_property
    def texts(self) -> Texts:
        """Text embeddings by prompt id."""
        return Texts(
            records.Reader([text_path(self._folder)], self.index.num_prompts + 1),
            self.index.text_shape,
            self.index.made["dtype"],
        )

    def part(self, videos: range) -> "Pairs":
        """Those of some consecutive videos."""
        return Pairs(self._folder, self.index, videos)

    @property
    def num_videos(self) -> int:
        """Videos of this part."""
        return len(self._videos)

    def __len__(self) -> int:
        return self.num_videos * self.index.steps

    def order(self, seed: int, batch_size: int) -> grain.MapDataset:
        """Rows without end: all of them shuffled, and again otherwise, for each epoch."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()

    def another(self, row: int, rng: np.random.Generator) -> int:
        """Any row."""
        return int(rng.integers(len(self)))

    def x(self, row: int) -> tuple[Head, Float[np.ndarray, "frames height width channels"]]:
        """Which pair it is, and its state."""
        record = self._read(row, "x")
        return Head(*_HEAD.unpack_from(record)), self._array(record, _HEAD.size)

    def velocity(
        self, row: int, negative: bool
    ) -> Float[np.ndarray, "frames height width channels"]:
        """The teacher's velocity there, for the prompt or for the negative prompt."""
        return self._array(self._read(row, "u_neg" if negative else "u_cond"), 0)

    def _read(self, row: int, name: str) -> bytes:
        fields = self.index.fields
        first = self._videos.start * self.index.steps
        return self._records[(first + row) * len(fields) + fields.index(name)]

    def _array(self, record: bytes, offset: int) -> np.ndarray:
        return np.frombuffer(record, BFLOAT16, offset=offset).reshape(self.index.latent_shape)


def unfinished(folder: epath.Path, numbers: Sequence[int]) -> list[int]:
    """Which of these files of pairs are not there as they were written."""
    return [number for number in numbers if not records.intact(shard_path(folder, number))]


def open_folder(folder: epath.Path) -> Pairs:
    """The pairs of a folder; UserError if it holds none or not all, naming what is lacking."""
    index = read_index(folder)
    if index is None:
        raise UserError(f"{folder} holds no pairs; run the collect stage first.")
    paths = [text_path(folder), *(shard_path(folder, i) for i in range(index.num_shards))]
    if bad := [path.name for path in paths if not records.intact(path)]:
        some = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise UserError(
            f"{folder} lacks {some}, or they are damaged: run the collect stage again, which makes "
            "them anew."
        )
    return Pairs(folder, index)
