"""Stage collect: the teacher's guided trajectories on training prompts, stored as pairs."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file

from linvideo_jax import checkpoints, loop, pipeline
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.data import trajectories
from linvideo_jax.errors import UserError
from linvideo_jax.flow import grids, rectified, solvers
from linvideo_jax.models import wan
from linvideo_jax.models.module import bind
from linvideo_jax.progress import Progress


class Collection(NamedTuple):
    """Pairs, the grid that they were made on, and the text that their prompt ids index."""

    pairs: trajectories.Pairs
    sigmas: Float[np.ndarray, " steps+1"]
    sampler: str
    guidance_scale: float
    text: Float[np.ndarray, "prompts tokens text_dim"]
    text_lengths: Int[np.ndarray, " prompts"]
    negative_text: Float[np.ndarray, "1 tokens text_dim"]
    negative_length: Int[np.ndarray, " 1"]


def make_rollout(wan_config: wan.WanConfig, sigmas, sampler: str, guidance_scale: float, dtype):
    """A jitted (params, noise, text, lengths) -> (states, u_cond, u_neg), [steps, videos, ...].

    `text` and `lengths` hold the conditional half, then the negative half.
    """
    times = grids.network_timesteps(sigmas, sampler)

    @jax.jit
    def rollout(
        params,
        noise: Float[Array, "videos frames height width channels"],
        text: Float[Array, "2*videos tokens text_dim"],
        lengths: Int[Array, " 2*videos"],
    ):
        model = bind(wan.WanTransformer, wan_config, params)

        def velocity(x, time):
            both = jnp.concatenate([x, x])
            u = model(both, jnp.full((both.shape[0],), time), text, lengths, dtype=dtype)
            u_cond, u_neg = jnp.split(u, 2)
            return rectified.guided(u_cond, u_neg, guidance_scale), (
                x.astype(jnp.bfloat16),
                u_cond.astype(jnp.bfloat16),
                u_neg.astype(jnp.bfloat16),
            )

        _, seen = solvers.sample(velocity, noise, sigmas, sampler, times=times, has_aux=True)
        return seen

    return rollout


def run(config, workdir: Path) -> None:
    """Makes `workdir/pairs`; shards that are there already are kept."""
    settings = config.collect
    folder = Path(workdir) / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-settings.num_videos // settings.batch_size)
    missing = list(trajectories.missing_shards(folder, num_shards))
    if not missing:
        return
    prompts = prompt_files.read(config.prompts)
    teacher = checkpoints.load(config.checkpoint)
    sampling = pipeline.overridden(teacher.sampling, settings.sampling.to_dict())
    if sampling["sampler"] == "renoise":
        raise UserError(
            f"{config.checkpoint} is sampled with renoise, whose states are no trajectory: choose "
            "a teacher that is not distilled."
        )
    sigmas = pipeline.Settings(**sampling).sigmas()
    text, lengths = _encoded_text(teacher, [*prompts, settings.negative_prompt], folder)
    loop.write_json(
        folder / "grid.json",
        {"sigmas": sigmas.tolist(), "num_shards": num_shards, **sampling},
    )
    rollout = make_rollout(
        teacher.wan_config,
        sigmas,
        sampling["sampler"],
        sampling["guidance_scale"],
        jnp.dtype(config.dtype),
    )
    shape = pipeline.latent_shape(
        teacher.wan_config,
        teacher.vae_config,
        *(sampling[name] for name in ("height", "width", "num_frames")),
    )
    batch = settings.batch_size
    with Progress("collect", num_shards * batch, (num_shards - len(missing)) * batch) as progress:
        for done, index in enumerate(missing, num_shards - len(missing) + 1):
            seeds = config.seed * 1_000_003 + index * batch + np.arange(batch)
            prompt = (index * batch + np.arange(batch)) % len(prompts)
            rows = np.concatenate([prompt, np.full(batch, len(prompts))])
            noise = pipeline.noise(seeds, shape)
            seen = rollout(teacher.transformer, noise, text[rows], lengths[rows])
            x, u_cond, u_neg = jax.device_get(seen)
            trajectories.write_shard(folder, index, x, u_cond, u_neg, prompt, seeds)
            progress.update(done * batch, "videos")


def _encoded_text(teacher, prompts: list[str], folder: Path):
    """Text embeddings of all prompts, the negative one last, also stored beside the pairs."""
    text, lengths = pipeline.Pipeline(teacher).encode_prompts(prompts)
    text, lengths = np.asarray(text), np.asarray(lengths, np.int32)
    save_file({"text": text, "lengths": lengths}, folder / "text.safetensors")
    return text, lengths


def read(workdir: Path) -> Collection:
    """What `run` stored."""
    folder = Path(workdir) / "pairs"
    if not (folder / "grid.json").exists():
        raise UserError(f"{folder} holds no pairs; run the collect stage first.")
    grid = loop.read_json(folder / "grid.json")
    stored = load_file(folder / "text.safetensors")
    return Collection(
        pairs=trajectories.read_pairs(folder, grid["num_shards"]),
        sigmas=np.asarray(grid["sigmas"]),
        sampler=grid["sampler"],
        guidance_scale=grid["guidance_scale"],
        text=stored["text"][:-1],
        text_lengths=stored["lengths"][:-1],
        negative_text=stored["text"][-1:],
        negative_length=stored["lengths"][-1:],
    )
