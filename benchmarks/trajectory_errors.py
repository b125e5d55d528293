"""Where on a trajectory a student errs, and how far each step's error moves the video.

python benchmarks/trajectory_errors.py --checkpoint=assets/wan_digits_linear \
    --teacher=assets/wan_digits --out=runs/trajectory_errors.json

The teacher's guided Euler trajectories; at every step of the grid the student's velocities beside
the teacher's, and the end of a trajectory that makes this one step with the student and all others
with the teacher. Squared errors are means over videos and latent elements. `displacement` is that
of the end; a student that errs at one step alone would be so far from its teacher. Some
num_inference_steps^2 / 2 forwards of both branches for each video: a few minutes for wan-digits on
two CPU cores.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from linvideo_jax import checkpoints, command_line, loop
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.errors import UserError
from linvideo_jax.flow import grids, rectified
from linvideo_jax.folders import replacing
from linvideo_jax.models.wan import WanConfig
from linvideo_jax.pipeline import Pipeline, Settings, noise, sampling_network
from linvideo_jax.progress import Progress

FLAGS = {
    "checkpoint": (None, "the student"),
    "teacher": (None, "what it was made of"),
    "out": (None, "JSON file; the table is written beside it as .md"),
    "prompts": ("assets/prompts_digits_test.txt", "file of prompts, one a line"),
    "num_videos": ("8", "how many, on as many prompts from over the whole file"),
    "num_inference_steps": ("20", "steps of the grid"),
    "seed": ("0", "of the first video's noise"),
}


class Problem(NamedTuple):
    """What all networks are asked about. text, lengths: of the prompts, then as often of the
    negative prompt."""

    start: Float[Array, "videos frames height width channels"]
    text: Float[Array, "2*videos tokens text_dim"]
    lengths: Int[Array, " 2*videos"]
    sigmas: tuple[float, ...]
    sampler: str
    guidance_scale: float


class Network(NamedTuple):
    """A model's velocities. mode: of its layers, None where all are softmax."""

    params: Any
    config: WanConfig
    mode: np.ndarray | None

    @classmethod
    def of(cls, checkpoint: checkpoints.Checkpoint) -> "Network":
        """Of a loaded checkpoint."""
        return cls(checkpoint.transformer, checkpoint.wan_config, Pipeline(checkpoint).mode)

    def at(self, problem: Problem, x: Array, step: int) -> tuple[Array, Array]:
        """(u_cond, u_neg) at x and a step of the grid."""
        asked = problem.text, problem.lengths, x, step
        options = {"sigmas": problem.sigmas, "sampler": problem.sampler}
        return _velocities(self.params, self.mode, *asked, config=self.config, **options)


@partial(jax.jit, static_argnames=("config", "sigmas", "sampler"))
def _velocities(params, mode, text, lengths, x, step, *, config, sigmas, sampler):
    timesteps = grids.network_timesteps(np.array(sigmas), sampler)
    times, network = sampling_network(params, config, x.shape, timesteps, text, lengths, mode=mode)
    return network(x, jax.tree.map(lambda leaf: leaf[step], times))


def measured(teacher: Network, student: Network, problem: Problem) -> dict[str, Any]:
    """Rows by step, and the mean square distance of the student's own videos from the teacher's."""
    sigmas, steps, rows = problem.sigmas, len(problem.sigmas) - 1, []

    def guided(u: tuple[Array, Array]) -> Array:
        return rectified.guided(*u, problem.guidance_scale)

    def moved(x: Array, step: int, u: tuple[Array, Array]) -> Array:
        return x + (sigmas[step + 1] - sigmas[step]) * guided(u)

    def rest(network: Network, x: Array, step: int) -> Array:
        for k in range(step, steps):
            x = moved(x, k, network.at(problem, x, k))
        return x

    states, velocities = [problem.start], []
    for step in range(steps):
        velocities.append(teacher.at(problem, states[-1], step))
        states.append(moved(states[-1], step, velocities[-1]))
    end, own = states.pop(), rest(student, problem.start, 0)
    with Progress("steps", steps) as progress:
        for step, (x, theirs) in enumerate(zip(states, velocities, strict=True)):
            ours = student.at(problem, x, step)
            aside = rest(teacher, moved(x, step, ours), step + 1)
            rows.append(
                {
                    "step": step,
                    "t": sigmas[step],
                    "error_cond": _square(ours[0] - theirs[0]),
                    "error_neg": _square(ours[1] - theirs[1]),
                    "error_guided": _square(guided(ours) - guided(theirs)),
                    "displacement": _square(aside - end),
                }
            )
            progress.update(step + 1, f"t {sigmas[step]:.3f}")
    return {"distance": _square(own - end), "rows": rows}


def _square(x: Array) -> float:
    return float(jnp.mean(jnp.square(x)))


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each step, with its share of all displacements."""
    total = sum(row["displacement"] for row in result["rows"])
    lines = [
        "| step | t | error, prompt | negative | guided | displacement of the end | its share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        errors = (f"{row[f'error_{name}']:.4f}" for name in ("cond", "neg", "guided"))
        moved = row["displacement"]
        lines.append(
            f"| {row['step']} | {row['t']:.3f} | {' | '.join(errors)} | {moved:.2e} "
            f"| {moved / total:.1%} |"
        )
    lines += ["", f"Mean square distance of the student's own videos: {result['distance']:.3f}."]
    return "\n".join([*lines, ""])


def program(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "checkpoint", "teacher", "out")
    numbers = command_line.integers(given, "num_videos", "num_inference_steps", "seed")
    lines, count = prompt_files.read(given["prompts"]), numbers["num_videos"]
    if not 1 <= count <= len(lines):
        raise UserError(f"--num_videos={count}: choose 1 to {len(lines)}, the prompts in the file.")
    teacher, student = (checkpoints.load(given[name]) for name in ("teacher", "checkpoint"))
    if teacher.linear_layers:
        raise UserError(f"{given['teacher']} has linear layers: name the teacher without.")
    prompts = lines[:: len(lines) // count][:count]
    settings = Settings.of(teacher, num_inference_steps=numbers["num_inference_steps"])
    pipeline = Pipeline(teacher, jnp.float32)
    text, lengths = pipeline.encode_prompts([*prompts, *[settings.negative_prompt] * count])
    seeds = range(numbers["seed"], numbers["seed"] + count)
    problem = Problem(
        noise(seeds, pipeline.latent_shape(settings)),
        text,
        jnp.asarray(lengths),
        tuple(settings.sigmas().tolist()),
        settings.sampler,
        settings.guidance_scale,
    )
    asked = {name: value for name, value in given.items() if name not in ("out", "help")}
    result = {"settings": asked, "device": jax.devices()[0].device_kind}
    result |= measured(Network.of(teacher), Network.of(student), problem)
    out = Path(given["out"])
    loop.write_json(out, result)
    with replacing(out.with_suffix(".md")) as temporary:
        temporary.write_text(table(result), encoding="utf-8")
    print(table(result))


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(program, argv, "give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
