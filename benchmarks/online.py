"""What an update costs on stored pairs, and on pairs that the teacher makes meanwhile.

python benchmarks/online.py --workdir=runs/online --out=runs/online/online.json
python benchmarks/online.py --workdir=runs/online --out=runs/online/online.json --tiny

For configs/digits.py, or --tiny for a random model that tries the program out: collects `--videos`
videos, and times `--updates` updates of mixed layers on them; then the same online, in rounds of so
many videos, 256 at most, for each of `--reuse`, how often a pair is trained on. The rounds that
fill the buffer at the start are timed apart. A line of the JSON file is written as soon as it is
known, and kept by the next run. Two CPU cores take --videos=8 --batch_size=4 --updates=40.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
from absl import flags

from benchmarks import tiny
from configs import digits
from linvideo_jax import checkpoints, command_line, folders, loop
from linvideo_jax.data import loader
from linvideo_jax.errors import UserError
from linvideo_jax.stages import collect, transfer
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import knobs_at


def config_of(workdir: Path, videos: int, batch_size: int, small: bool):
    """configs/digits.py with ADM; with a tiny teacher and few videos at a time if `small`."""
    config = digits.get_config()
    config.collect.num_videos = videos
    config.collect.batch_size = min(config.collect.batch_size, videos)
    config.transfer.batch_size = batch_size
    config.transfer.objective = "adm"  # of docs/pairs.md's figures
    if jax.default_backend() == "cpu":
        config.dtype = "float32"
    if small:
        config.checkpoint = str(workdir / "teacher")
        if not Path(config.checkpoint).exists():
            tiny.write_teacher(Path(config.checkpoint))
        config.dtype = "float32"
    return config


def measured(config, workdir: Path, teacher, updates: int) -> dict[str, Any]:
    """Seconds an update of mixed layers, the first ones left out, which compile and fill."""
    settings = config.transfer
    pairs = collect.opened(config, workdir, teacher, settings.batch_size)
    recipe = transfer.recipe_of(config, settings, pairs.index, teacher)
    dataset = transfer.samples_of(pairs, recipe, settings, config.seed)
    batches = loader.batches(dataset, settings.batch_size, num_threads=pairs.num_threads)
    began = time.perf_counter()
    first = next(batches)
    filled = time.perf_counter() - began
    state = training.initial_state(settings, recipe.student, teacher.transformer)
    knobs = knobs_at(settings, settings.warmup_steps, 1e-4, 1.0, True)

    def update(state, i, batch):
        key = jax.random.key(i)
        return training.update(recipe, state, teacher.transformer, batch, knobs, key)[0]

    for i in range(3):  # compiles, for a state as it was made and for one that came back
        state = update(state, i, first)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for i, batch in enumerate(itertools.islice(batches, updates)):
        state = update(state, i, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / updates
    return {"seconds_an_update": round(seconds, 5), "seconds_before": round(filled, 3)}


def rows(config, workdir: Path, updates: int, reuses: Sequence[float], done: list[dict]):
    """A line for stored pairs and one for each reuse, those in `done` left out."""
    teacher = checkpoints.load(config.checkpoint)
    common = {"videos": config.collect.num_videos, "updates": updates}
    common |= {"batch": config.transfer.batch_size, "device": jax.devices()[0].device_kind}
    for mode, reuse in (("stored", 0.0), *(("online", reuse) for reuse in reuses)):
        row = common | {"mode": mode, "reuse": reuse}
        if any(row.items() <= before.items() for before in done):
            continue
        config.collect.update(mode=mode, reuse=reuse or 1.0)
        began = time.perf_counter()
        collect.run(config, workdir)
        collected = time.perf_counter() - began
        row |= measured(config, workdir, teacher, updates)
        if mode == "stored":
            row["seconds_before"] = round(collected, 3)
        yield row


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(
        {"workdir": (None, "folder of the pairs"), "out": (None, "JSON file of the results")}
    )
    flags.DEFINE_integer("videos", 1024, "stored ones", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "of updates", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("updates", 400, "that are timed", lower_bound=1, flag_values=values)
    flags.DEFINE_list("reuse", ["1", "4"], "of the online lines", flag_values=values)
    flags.DEFINE_bool("tiny", False, "a tiny random model", flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "workdir", "out")
    workdir, out = Path(given["workdir"]), Path(given["out"])
    try:
        reuses = [float(reuse) for reuse in given["reuse"]]
    except ValueError:
        raise UserError(
            f"--reuse={','.join(given['reuse'])} is wrong: write numbers with commas."
        ) from None
    folders.check_writable(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    videos, batch_size, updates = (given[name] for name in ("videos", "batch_size", "updates"))
    if given["tiny"]:
        videos, batch_size, updates = 8, 8, 6
    config = config_of(workdir, videos, batch_size, given["tiny"])
    found = loop.read_json(out) if out.exists() else []
    for row in rows(config, workdir, updates, reuses, found):
        found.append(row)
        loop.write_json(out, found)
        name = "stored" if row["mode"] == "stored" else f"online, each pair {row['reuse']:g} times"
        print(
            f"{name}: {1e3 * row['seconds_an_update']:,.1f} ms an update, "
            f"{row['seconds_before']:,.1f} s before the first",
            flush=True,
        )


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
