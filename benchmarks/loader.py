"""How many pairs a second come from disk, for wan-digits' pairs and for those of 480p.

python benchmarks/loader.py --folder=runs/loader --out=runs/loader/loader.json

Writes pairs of random numbers with the writer of the stage collect, reads batches of them as a
training does, shuffled, and removes them. Each line is measured twice: with the files in the
system's page cache, and after they were dropped from it, which is what the disk gives. "a core":
pairs for each second of a core's time, which is what a busy machine leaves comparable. --tiny tries
the program out.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from linvideo_jax import command_line, folders, loop
from linvideo_jax.data import loader, records, trajectories
from linvideo_jax.data.trajectories import BFLOAT16, Index, Trajectories
from linvideo_jax.errors import UserError
from linvideo_jax.transfer.samples import Draw

# latents, steps, videos a file, files, text, batch; 81 frames of 480 x 832 are 21 x 60 x 104.
SIZES = {
    "digits": ((7, 12, 12, 16), 20, 64, 4, (32, 256), 64),
    "480p": ((21, 60, 104, 16), 10, 3, 4, (128, 4096), 4),
}
TINY = {"tiny": ((1, 2, 2, 4), 3, 2, 2, (32, 4), 2)}
PROMPTS, THREADS = 100, (0, 1, 2, 4, 8)


def index_of(size: tuple) -> Index:
    """Of a collection of one of SIZES."""
    latents, steps, videos, files, text, _ = size
    made = {"batch_size": videos, "store_velocity": "both", "dtype": "bfloat16"}
    return Index(made, tuple(np.linspace(1, 0, steps + 1)), latents, videos * files, PROMPTS, text)


def write(folder: epath.Path, index: Index) -> float:
    """Makes the files; bytes a second, checksums included."""
    rng = np.random.default_rng(0)
    videos = index.made["batch_size"]
    texts = [rng.normal(size=(20, index.text_shape[1])).astype(BFLOAT16).tobytes()] * (PROMPTS + 1)
    records.write(trajectories.text_path(folder), texts)
    trajectories.write_index(folder, index)
    seconds = 0.0
    for number in range(index.num_shards):
        shape = (index.steps, videos, *index.latent_shape)
        x = rng.standard_normal(shape, np.float32).astype(BFLOAT16)
        prompts = [(number * videos + i) % PROMPTS for i in range(videos)]
        made = Trajectories(x, x, x, prompts, prompts)
        began = time.perf_counter()
        trajectories.write_shard(folder, number, index, made, 0.0)
        seconds += time.perf_counter() - began
    return index.num_shards * index.shard_bytes / seconds


def drop_from_cache(folder: epath.Path) -> None:
    """The files are read from the disk the next time (Linux)."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: epath.Path, batch_size: int, num_threads: int) -> tuple[float, float]:
    """Pairs a second, and a second of one core, over one epoch; opening of the files included."""
    pairs = trajectories.open_folder(folder)
    recipe = SimpleNamespace(
        sigmas=pairs.index.sigmas, steps=pairs.index.steps, objective="adm", t_to="next",
        velocity="stored", has_score_network=False,
    )  # fmt: skip
    draw = Draw(pairs, recipe, 0.1, 1)
    batches = loader.batches(
        loader.samples(pairs, draw, 0, batch_size), batch_size, num_threads=num_threads
    )
    count = max(1, len(pairs) // batch_size)
    began, core = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    seconds, core = time.perf_counter() - began, time.process_time() - core
    batches.close()
    return count * batch_size / seconds, count * batch_size / core


def rows(folder: epath.Path, sizes: dict[str, tuple]) -> Iterator[dict[str, Any]]:
    """A line for each size and number of threads."""
    for name, size in sizes.items():
        index = index_of(size)
        folders.check_space(Path(folder), index.num_shards * index.shard_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            written = write(folder, index)
            read_bytes = 2 * 2 * int(np.prod(index.latent_shape))  # x and one velocity
            for num_threads in THREADS:
                row = {"size": name, "threads": num_threads, "batch": size[-1]}
                row |= {"bytes_a_pair": read_bytes, "written_bytes_a_second": round(written)}
                for cache in ("cached", "from_disk"):
                    if cache == "from_disk":
                        drop_from_cache(folder)
                    rate, of_core = read(folder, size[-1], num_threads)
                    row |= {cache: round(rate, 1), f"{cache}_a_core": round(of_core, 1)}
                yield row
        finally:
            shutil.rmtree(folder)


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(
        {
            "folder": (None, "where the pairs are written for a while; it must not exist"),
            "out": (None, "JSON file of the results"),
        }
    )
    flags.DEFINE_bool("tiny", False, "tiny pairs, to try the program out", flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "folder", "out")
    folders.check_writable(Path(given["folder"]), "--folder")
    if Path(given["folder"]).exists():
        raise UserError(f"{given['folder']} exists: name a folder that does not, for --folder.")
    found = []
    print(
        "| size | threads | pairs/s, cached | MB/s | a core | from disk | MB/s | a core |", end=""
    )
    print(" written, MB/s |")
    print("|---" * 9 + "|")
    for row in rows(epath.Path(given["folder"]), TINY if given["tiny"] else SIZES):
        found.append(row)
        loop.write_json(Path(given["out"]), {"cores": os.cpu_count(), "rows": found})
        cells = [row["size"], row["threads"]]
        for cache in ("cached", "from_disk"):
            rate, of_core = row[cache], row[f"{cache}_a_core"]
            megabytes = rate * row["bytes_a_pair"] / 1e6
            cells += [f"{rate:,.0f}", f"{megabytes:,.0f}", f"{of_core:,.0f}"]
        cells.append(f"{row['written_bytes_a_second'] / 1e6:,.0f}")
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(program, argv, "give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
