"""Latency of Wan2.1 at true size, ours beside diffusers, with random weights on one GPU.

python benchmarks/latency.py --out=runs/latency.json
python benchmarks/latency.py --out=runs/latency.json --scaling
JAX_PLATFORMS=cpu python benchmarks/latency.py --small --out=runs/small.json

Each part is measured once, in a process of its own, and written to --out at once; the table is
printed at the end, and written beside --out as .md and .svg. The parts:

forward_1.3b, forward_14b   one forward of one video, all rows taking turns in every round; needs
                            diffusers for its rows
steps_1.3b, steps_14b       consecutive steps of the sampling loop with guidance, and four without
stages                      text encoder, VAE, and what moving weights to the GPU takes
mp4                         writing the files, and decoding into them as sample.py does; needs PyAV
scaling                     one forward against the number of tokens (--scaling)
batch                       one to eight videos in a forward (--scaling)
profile_1.3b, profile_14b   the slowest kernels, and named scopes
pace_1.3b, pace_14b         LinVideo's forward over and over for a minute, with the GPU's clock,
                            power and temperature during each: whether it keeps its pace
pieces                      choices that want a measurement: products apart or as one, the VAE's
                            convolution by taps side by side (as it is) or as cuDNN's own
flags                       one forward of 1.3B under other flags of XLA, each in a process
mesh_of_one                 what the code for meshes costs on a mesh of one device, which runs leave
                            out there: a forward of 1.3B, and an update with ADM of four blocks
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import contenders, hot_kernels, latency_table, measure, mesh_of_one
from linvideo_jax import command_line, pipeline, text
from linvideo_jax.metrics import flops
from linvideo_jax.models import module, registry
from linvideo_jax.models.umt5 import UMT5Encoder
from linvideo_jax.models.vae import WanVAE
from linvideo_jax.models.vae_layers import convolve_time
from linvideo_jax.models.wan import WanTransformer

FLAGS = {
    "out": (None, "JSON file of the results"),
    "parts": (None, "what to measure; default the table's"),
}
TABLE = ("forward_1.3b", "steps_1.3b", "stages", "mp4", "forward_14b", "steps_14b")
SCALING = ("scaling", "batch")

# Tried by the part `flags`; XLA refuses what its version does not know, and that is recorded.
XLA_FLAGS = (
    "",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_cublaslt=true",
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_autotune_level=5",
)


class Size(NamedTuple):
    """One model at one resolution. linear: how many layers LinVideo makes linear."""

    name: str
    models: registry.ModelSizes
    height: int
    width: int
    frames: int
    linear: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one video's latents."""
        wan, vae = self.models.transformer, self.models.vae
        return pipeline.latent_shape(wan, vae, self.height, self.width, self.frames)

    @property
    def tokens(self) -> int:
        """Of one video."""
        return flops.video_tokens(self.models.transformer, self.shape)

    def latents(self) -> jax.Array:
        """Of one video, random."""
        return jax.random.normal(jax.random.key(0), (1, *self.shape))

    def about(self) -> dict[str, Any]:
        """What figures of it are of."""
        blocks = self.models.transformer.num_layers
        return {"size": self.name, "blocks": blocks, "tokens": self.tokens, "linear": self.linear}

    def rows(self) -> dict[str, Sequence[int] | None]:
        """Our rows, and the layers that are linear in them."""
        layers = range(self.models.transformer.num_layers)
        return {"dense": None, "LinVideo": layers[: self.linear], "all linear": layers}


class Benchmark:
    """The parts as methods without arguments that return figures."""

    def __init__(self, small: bool, rounds: int, steps: int, blocks: int | None):
        self.rounds, self.steps, self.small = rounds, steps, small
        self.dtype = jnp.dtype(jnp.bfloat16)
        first, large = registry.wan2_1_t2v_1_3b(), registry.wan2_1_t2v_14b()
        self.sizes = {
            "1.3b": Size("1.3B, 480p", first, 480, 832, 81, 16),
            "14b": Size("14B, 720p", large, 720, 1280, 81, 22),
        }
        if blocks:
            fewer = replace(large.transformer, num_layers=blocks)
            linear = round(22 / 40 * blocks)
            large = Size("14B, 720p", replace(large, transformer=fewer), 720, 1280, 81, linear)
            self.sizes["14b"] = large
        if small:
            digits = registry.wan_digits()
            digits = replace(digits, transformer=replace(digits.transformer, num_layers=2))
            self.sizes = {
                "1.3b": Size("tiny", digits, 64, 96, 5, 1),
                "14b": Size("small", digits, 96, 96, 9, 1),
            }

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All parts by name."""
        known = {}
        for name in self.sizes:
            known[f"forward_{name}"] = partial(self.forward, name)
            known[f"ours_{name}"] = partial(self.forward, name, theirs=False)
            known[f"steps_{name}"] = partial(self.consecutive_steps, name)
            known[f"profile_{name}"] = partial(self.profile, name)
            known[f"pace_{name}"] = partial(self.pace, name)
        others = (self.stages, self.mp4, self.scaling, self.batch, self.pieces, self.mesh_of_one)
        return known | {part.__name__: part for part in others} | {"flags": self.flags}

    def forward(self, name: str, theirs: bool = True) -> dict[str, Any]:
        """All rows of one size."""
        size = self.sizes[name]
        ours = contenders.Ours(size.models.transformer, self.dtype)
        runs = {row: ours.forward(size.shape, layers) for row, layers in size.rows().items()}
        if theirs:
            other = contenders.Diffusers(size.models.transformer)
            for row, backend in other.backends().items():
                runs[row] = other.forward(size.shape, backend)
        return size.about() | {"rows": self._measured(runs, self.rounds)}

    def _measured(
        self, runs: dict[str, contenders.Run], rounds: int, warm_up: bool = True
    ) -> dict[str, Any]:
        timed = {name: run.run for name, run in runs.items()}
        rows = measure.interleaved(timed, rounds, warm_up)
        for name, run in runs.items():
            rows[name] |= {
                "peak_bytes": run.peak_bytes(),
                "compile_seconds": run.compile_seconds,
                "tflop_per_second": run.operations / rows[name]["seconds"] / 1e12,
            }
        return rows

    def consecutive_steps(self, name: str) -> dict[str, Any]:
        """Seconds of a step with guidance, of `steps` in a row, and of four steps without."""
        size = self.sizes[name]
        ours = contenders.Ours(size.models.transformer, self.dtype)
        runs, rows = {}, size.rows()
        for row in ("dense", "LinVideo"):
            mode = None if rows[row] is None else ours.mode(rows[row])
            runs[f"{row}, guided"] = self._loop(ours, size, mode, self.steps, 2)
            runs[f"{row}, 4 steps"] = self._loop(ours, size, mode, 4, 1)
        rounds = max(1, self.rounds // 4)
        measured = measure.interleaved(runs, rounds, warm_up=self.small)
        for row, figures in measured.items():
            figures["steps"] = 4 if row.endswith("4 steps") else self.steps
        return size.about() | {"rows": measured}

    def _loop(self, ours: contenders.Ours, size: Size, mode, steps: int, halves: int):
        lengths = (contenders.TEXT_LENGTH, 130)[:halves]
        inputs, options = contenders.sampling_loop(
            ours.config, ours.params, size.shape, lengths, steps, self.dtype, mode
        )
        compiled = pipeline.denoise.lower(*inputs, **options).compile()
        return partial(measure.ready, compiled, *inputs)

    def stages(self) -> dict[str, Any]:
        """What is not the sampling loop, for both sizes; files are in `mp4`."""
        runs, sizes = {}, self.sizes.values()
        umt5 = self.sizes["1.3b"].models.text_encoder
        params = measure.random_params(UMT5Encoder, umt5, self.dtype)
        bucket = text.text_bucket(contenders.TEXT_LENGTH)
        ids = jnp.ones((max(1, text.TOKENS_AT_ONCE // bucket), bucket), jnp.int32)
        lengths = jnp.full(len(ids), contenders.TEXT_LENGTH)

        @jax.jit
        def encode(params):
            return module.bind(UMT5Encoder, umt5, params)(ids, lengths, dtype=self.dtype)

        figures = measure.interleaved(
            {"text encoder": partial(measure.ready, encode, params)}, self.rounds
        )
        del params
        vae = self._vae()
        for size in sizes:
            inputs = vae, size.latents()
            for dtype in (jnp.float32, jnp.bfloat16):
                name = f"VAE decode, {jnp.dtype(dtype)}, {size.name}"
                runs[name] = partial(_decode, *inputs, dtype)
        figures |= measure.interleaved(runs, max(1, self.rounds // 2))
        moves = {size.name: partial(_move, size.models.transformer, self.dtype) for size in sizes}
        for name, move in moves.items():
            figures[f"weights to the device, {name}"] = move()
        return {"rows": figures}

    def mp4(self) -> dict[str, Any]:
        """Writing a video's file, on the CPU, and writing it while the VAE decodes."""
        runs, vae = {}, self._vae()
        for size in self.sizes.values():
            clip = _moving_picture(size.frames, size.height, size.width)
            runs[f"mp4, {size.name}"] = partial(_write, clip)
            name = f"decode to mp4, {size.name}"
            runs[name] = partial(_decode_to_mp4, vae, size.latents(), self.dtype, clip)
        return {"rows": measure.interleaved(runs, 3)}

    def _vae(self) -> WanVAE:
        """The one of all sizes, with random weights."""
        config = self.sizes["1.3b"].models.vae
        return module.bind(WanVAE, config, measure.random_params(WanVAE, config, jnp.float32))

    def scaling(self) -> dict[str, Any]:
        """Videos of 17 to 1,281 frames at 480p: 8 thousand to 500 thousand tokens."""
        size = self.sizes["1.3b"]
        counts = (5, 9, 17) if self.small else (17, 41, 81, 161, 321, 641, 1281)
        ours = contenders.Ours(size.models.transformer, self.dtype)
        points = []
        for frames in counts:
            longer = size._replace(frames=frames)
            for row, layers in longer.rows().items():
                point = {"row": row, "frames": frames, "tokens": longer.tokens}
                rounds = 1 if frames > 200 else self.rounds
                forward = partial(ours.forward, longer.shape, layers)
                # Far over a second each: the first run is as good as any.
                point |= self._alone(forward, row, rounds, warm_up=frames <= 600)
                points.append(point)
                print(point, flush=True)
        return {"points": points, "exponents": latency_table.exponents(points)}

    def _alone(self, forward, row: str, rounds: int, warm_up: bool = True) -> dict[str, Any]:
        """Figures of one run, or its error where memory ends."""
        try:
            return self._measured({row: forward()}, rounds, warm_up)[row]
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error).splitlines()[0]}

    def batch(self) -> dict[str, Any]:
        """Videos a second of one to eight in a forward."""
        size = self.sizes["1.3b"]
        ours = contenders.Ours(size.models.transformer, self.dtype)
        points = []
        for count in (1, 2, 4, 8):
            for row, layers in size.rows().items():
                forward = partial(ours.forward, size.shape, layers, count)
                figures = self._alone(forward, row, max(1, self.rounds // 2))
                points.append({"row": row, "batch": count, **figures})
                if "seconds" in figures:
                    points[-1]["seconds_per_video"] = figures["seconds"] / count
        return size.about() | {"points": points}

    def profile(self, name: str) -> dict[str, Any]:
        """Of LinVideo's forward and of the dense one."""
        size = self.sizes[name]
        ours = contenders.Ours(size.models.transformer, self.dtype)
        found = {}
        for row, layers in size.rows().items():
            run = ours.forward(size.shape, layers)
            found[row] = hot_kernels.profile(run.run, run.program)
        return size.about() | {"rows": found}

    def pace(self, name: str) -> dict[str, Any]:
        """Seconds of LinVideo's forwards in a row, and what the GPU says of itself during each."""
        size, minute = self.sizes[name], 0.0 if self.small else 60.0
        ours = contenders.Ours(size.models.transformer, self.dtype)
        forward, points = ours.forward(size.shape, size.rows()["LinVideo"]).run, []
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:
            while not points or time.perf_counter() - began < minute:
                seen, start = beside.submit(measure.gpu_state), time.perf_counter()
                forward()
                points.append({"seconds": time.perf_counter() - start, **seen.result()})
        return size.about() | {"points": points}

    def pieces(self) -> dict[str, Any]:
        """Queries, keys and values by three products or one, convolutions in two or three axes."""
        runs = {}
        for size in self.sizes.values():
            dim = size.models.transformer.dim
            x = jax.random.normal(jax.random.key(0), (size.tokens, dim), self.dtype)
            weights = jax.random.normal(jax.random.key(1), (3, dim, dim), self.dtype)
            one = jnp.concatenate(list(weights), axis=1)
            apart = jax.jit(lambda x, weights: _normed(*(x @ weight for weight in weights)))
            joint = jax.jit(lambda x, one: _normed(*jnp.split(x @ one, 3, axis=1)))
            runs[f"q, k, v apart, {size.name}"] = partial(measure.ready, apart, x, weights)
            runs[f"q, k, v as one, {size.name}"] = partial(measure.ready, joint, x, one)
        size, width = self.sizes["1.3b"], self.sizes["1.3b"].models.vae.base_dim
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jnp.ones((1, 6, size.height, size.width, width), dtype)
            kernel = jax.random.normal(jax.random.key(2), (3, 3, 3, width, width), dtype)
            for name, convolve in (("taps", convolve_time), ("3D", _convolve_3d)):
                run = jax.jit(convolve)
                inputs = (x, kernel, jnp.zeros(width, dtype))
                runs[f"VAE convolution, {name}, {x.dtype}"] = partial(measure.ready, run, *inputs)
        return {"rows": measure.interleaved(runs, 4 * self.rounds)}

    def mesh_of_one(self) -> dict[str, Any]:
        """LinVideo's forward and a training update, without a mesh and with one of one device."""
        size = self.sizes["1.3b"]
        blocks = 2 if self.small else 4
        rows = mesh_of_one.measured(size, self.dtype, self.rounds, blocks)
        return size.about() | {"rows": rows}

    def flags(self) -> dict[str, Any]:
        """Our rows of 1.3B under each of XLA_FLAGS."""
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for i, words in enumerate(XLA_FLAGS):
                path = Path(folder) / f"{i}.json"
                command = [sys.executable, __file__, f"--out={path}", "--parts=ours_1.3b"]
                command += ["--small"] if self.small else []
                done = subprocess.run(command, env=measure.with_flags(words), capture_output=True)
                if done.returncode == 0:
                    part = measure.Results(path, self.small).parts["ours_1.3b"]
                    found[words or "none"] = part["rows"]
                else:
                    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                    found[words] = {"error": " ".join(last)}
                print(words or "none", found[words or "none"], flush=True)
        return {"flags": found}


def _normed(q, k, v):
    """What follows in a layer: RMS norms of q and k, and v as it is."""

    def norm(x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    return norm(q).astype(q.dtype), norm(k).astype(k.dtype), v


def _convolve_3d(x, kernel, bias):
    """`vae_layers.convolve_time` as one convolution in three axes."""
    axes = ("NDHWC", "DHWIO", "NDHWC")
    padding = [(0, 0), (1, 1), (1, 1)]
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), padding, dimension_numbers=axes)
    return y + bias


def _moving_picture(frames: int, height: int, width: int) -> np.ndarray:
    """A soft gradient that moves: an encoder's time depends on the picture, and noise is slow."""
    y, x, t = np.ogrid[:height, :width, :frames]
    waves = [
        np.sin((x + 5 * t) / (40 + 9 * i)) + np.cos((y - 3 * t) / (55 - 7 * i)) for i in range(3)
    ]
    stacked = np.stack([np.moveaxis(wave, -1, 0) for wave in waves], axis=-1)
    # Frame by frame in memory, as a decoder hands them over.
    return np.ascontiguousarray((63.75 * (stacked + 2)).astype(np.uint8))


def _write(clip: np.ndarray) -> None:
    from linvideo_jax import video

    with tempfile.TemporaryDirectory() as folder:
        video.write_mp4(Path(folder) / "clip.mp4", clip)


def _decode(vae: WanVAE, latents: jax.Array, dtype) -> None:
    """To pixels in the host's memory."""
    for _ in vae.decode_pixels(latents, dtype):
        pass


def _decode_to_mp4(vae: WanVAE, latents: jax.Array, dtype, clip: np.ndarray) -> None:
    """Random weights decode to noise, which is slow to encode: `clip` is written in its place."""
    from linvideo_jax import video

    def pieces() -> Iterator[np.ndarray]:
        start = 0
        for (decoded,) in vae.decode_pixels(latents, dtype):
            yield clip[start : start + len(decoded)]
            start += len(decoded)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as writer:
        video.write_mp4_behind(writer, Path(folder) / "clip.mp4", pieces()).result()


def _move(config, dtype) -> dict[str, Any]:
    """Host memory to the device, as when the transformer's turn comes again."""
    params = measure.random_params(WanTransformer, config, dtype)
    host = jax.tree.map(np.asarray, params)
    del params
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        moved = jax.block_until_ready(jax.device_put(host))
        seconds.append(time.perf_counter() - start)
        del moved
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(host))
    return measure.summary(seconds[1:]) | {"bytes": size}


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    values = command_line.define(FLAGS)
    define = {"flag_values": values}
    flags.DEFINE_bool("small", False, "tiny networks, on any machine", **define)
    flags.DEFINE_bool("scaling", False, f"measure {', '.join(SCALING)} too", **define)
    flags.DEFINE_integer("rounds", 8, "how often each row is timed", 1, **define)
    flags.DEFINE_integer("steps", 6, "consecutive steps with guidance", 1, **define)
    flags.DEFINE_integer("blocks", None, "of 14B's 40, if memory or time is short", 1, 40, **define)
    given = command_line.parse(values, argv, __doc__)
    command_line.required(given, "out")
    out = Path(given["out"])
    results = measure.Results(out, values.small)
    benchmark = Benchmark(values.small, values.rounds, values.steps, values.blocks)
    wanted = (given["parts"] or ",".join(TABLE)).split(",") + list(SCALING) * values.scaling
    measure.run_parts(benchmark.parts(), wanted, results, measure.command(__file__, argv))
    if not measure.is_part():
        latency_table.write(measure.Results(out, values.small).everything, out)


def main(argv: Sequence[str]) -> int:
    """Runs the program with `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on with the parts that lack")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
