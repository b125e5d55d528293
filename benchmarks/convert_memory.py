"""How much memory the converters take and how fast they are, at true size.

python benchmarks/convert_memory.py --folder=/data/tmp
python benchmarks/convert_memory.py --folder=/data/tmp --model=wan2_1_t2v_1_3b \\
    --parts=transformer,vae,text_encoder --layout=original

Makes a random checkpoint in --layout, imports it, removes it, exports it again into --layout, and
compares some of its tensors bit for bit. Memory is the largest RssAnon of the process, Python and
its libraries included; files that it has mapped are not in it. The folder needs room for the
checkpoint twice and is empty afterwards.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from absl import flags

from benchmarks import random_checkpoint
from linvideo_jax import command_line, folders, loop
from linvideo_jax.models import registry
from linvideo_jax.parts import DTYPES, PARTS

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "folder": (None, "where the checkpoints are for a while"),
    "model": ("wan2_1_t2v_14b", f"one of {', '.join(registry.MODELS)}"),
    "parts": ("transformer", f"of {','.join(PARTS)}"),
    "layout": ("diffusers", "diffusers or original, which takes all parts"),
    "dtype": ("bfloat16", f"one of {', '.join(DTYPES)}"),
    "out": (None, "JSON file for the figures"),
}
LIMIT = 4 * 2**30  # bytes of RssAnon


def anonymous(process: int) -> int:
    """Bytes of RssAnon of a process of Linux; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def watched(words: Sequence[str]) -> dict[str, float]:
    """Runs a program of the repository: its seconds, and its peak RssAnon every 10 ms."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_rss_anon": peak}


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(FLAGS)
    flags.DEFINE_integer("layers", None, "of the transformer, fewer than true", flag_values=values)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "folder")
    command_line.choice("layout", given["layout"], ("diffusers", "original"))
    command_line.choice("dtype", given["dtype"], tuple(DTYPES))
    sizes, parts = registry.sizes(given["model"]), tuple(given["parts"].split(","))
    for part in parts:
        command_line.choice("parts", part, tuple(PARTS))
    if given["layout"] == "original":
        parts = tuple(PARTS)
    if given["layers"]:
        transformer = replace(sizes.transformer, num_layers=given["layers"])
        sizes = replace(sizes, transformer=transformer)
    folder = Path(given["folder"])
    folders.check_writable(folder, "--folder")
    source, ours, back = (folder / name for name in ("source", "ours", "back"))
    for leftover in (source, ours, back):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    alone = parts == ("transformer",)
    try:
        options = {"layout": given["layout"], "parts": parts, "dtype": given["dtype"]}
        start = time.perf_counter()
        size = random_checkpoint.write(source, sizes, **options)
        result = {
            "model": given["model"],
            "layers": sizes.transformer.num_layers,
            **options,
            "bytes": size,
            "made_seconds": time.perf_counter() - start,
        }
        # Of a transformer-only folder all parts would be found, those of its base too.
        words = [f"--source={source}", f"--out={ours}", f"--parts={','.join(parts)}"]
        result["import"] = watched(["convert/from_torch.py", *words])
        shutil.rmtree(source)
        random_checkpoint.check(ours, sizes, parts, given["dtype"])
        base = [f"--base={random_checkpoint.TOKENIZER.parent}"] if alone else []
        layout = "linvideo" if alone else given["layout"]
        words = [f"--checkpoint={ours}", f"--out={back}", f"--layout={layout}", *base]
        result["export"] = watched(["convert/to_torch.py", *words])
        shutil.rmtree(ours)
        if alone or given["layout"] == "diffusers":
            random_checkpoint.check(back, sizes, parts, given["dtype"])
    finally:
        for leftover in (source, ours, back):
            shutil.rmtree(leftover, ignore_errors=True)
    for what in ("import", "export"):
        one = result[what]
        one["bytes_per_second"] = size / one["seconds"]
        print(
            f"{what}: {size / 1e9:.1f} GB in {one['seconds']:.0f} s, "
            f"{one['bytes_per_second'] / 1e6:.0f} MB/s, "
            f"peak RssAnon {one['peak_rss_anon'] / 2**30:.2f} GiB"
        )
    if given["out"]:
        loop.write_json(Path(given["out"]), result)
    print(json.dumps(result))
    if max(result[what]["peak_rss_anon"] for what in ("import", "export")) > LIMIT:
        raise SystemExit(f"more than {LIMIT / 2**30:.0f} GiB")


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "what it made is removed; the same command starts anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
