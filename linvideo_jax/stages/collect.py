"""Stage collect: the teacher's guided trajectories on training prompts, stored as pairs.

With `config.collect.mode` "online" it stores nothing, and the transfer stage asks the teacher for
the pairs while it trains (`opened`).
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from linvideo_jax import compiled_programs, folders, pipeline, turns
from linvideo_jax.checkpoints import Checkpoint
from linvideo_jax.data import online, records, trajectories
from linvideo_jax.data import prompts as prompt_files
from linvideo_jax.data.texts import Texts
from linvideo_jax.data.trajectories import Index, Trajectories
from linvideo_jax.errors import UserError, check_counts
from linvideo_jax.flow import grids, rectified, solvers
from linvideo_jax.metrics import flops
from linvideo_jax.models import wan
from linvideo_jax.models.module import Params
from linvideo_jax.parallel.placement import Placement, whole
from linvideo_jax.progress import Progress

MODES = ("stored", "online")

# Of `Index.made`, what a transfer run compares: which model the pairs are of, and of what size.
MODEL = ("sizes", "transformer", "text_encoder", "height", "width", "num_frames")


def make_rollout(
    wan_config: wan.WanConfig, sigmas, sampler: str, guidance_scale: float, dtype, layout=None
):
    """A jitted (params, noise, text, lengths) -> (states, u_cond, u_neg), [steps, videos, ...].

    `text` and `lengths` hold the conditional half, then the negative half; `layout` as the network
    takes it.
    """
    timesteps = grids.network_timesteps(sigmas, sampler)

    @compiled_programs.jit
    def rollout(
        params,
        noise: Float[Array, "videos frames height width channels"],
        text: Float[Array, "2*videos tokens text_dim"],
        lengths: Int[Array, " 2*videos"],
    ):
        times, network = pipeline.sampling_network(
            params, wan_config, noise.shape, timesteps, text, lengths, dtype=dtype, layout=layout
        )

        def velocity(x, time):
            u_cond, u_neg = network(x, time)
            return rectified.guided(u_cond, u_neg, guidance_scale), (
                x.astype(jnp.bfloat16),
                u_cond.astype(jnp.bfloat16),
                u_neg.astype(jnp.bfloat16),
            )

        _, seen = solvers.sample(velocity, noise, sigmas, sampler, times=times, has_aux=True)
        return seen

    return rollout


class Teacher:
    """The model of `config.checkpoint` and the trajectories that it makes on `config.prompts`.

    Video v starts from the noise of a seed of its own, and has prompt v modulo their number.
    placement: where it works; None: on the devices of this host.
    """

    def __init__(self, config, placement: Placement | None = None):
        self.config, self.settings = config, config.collect
        self.checkpoint = turns.open_folder(config.checkpoint)
        if self.checkpoint.linear_layers:
            raise UserError(
                f"{config.checkpoint} has linear layers: pairs are made by a teacher without, so "
                "name one as checkpoint."
            )
        heads = self.checkpoint.wan_config.num_attention_heads
        self._placement = placement or Placement.of_host(config, heads)
        given = self.settings.sampling.to_dict()
        self.sampling = pipeline.overridden(self.checkpoint.sampling, given)
        if self.sampling["sampler"] == "renoise":
            raise UserError(
                f"{config.checkpoint} is sampled with renoise, whose states are no trajectory: "
                "choose a teacher that is not distilled."
            )
        self._pipeline = pipeline.Pipeline(self.checkpoint, config.dtype, placement=self._placement)

    @cached_property
    def made(self) -> dict[str, Any]:
        """What the pairs depend on, by name (`Index.made`)."""
        config, settings = self.config, self.settings
        return model_made(self.checkpoint) | {
            "prompts": hashlib.sha256("\n".join(self._all_prompts).encode()).hexdigest()[:16],
            "seed": config.seed,
            "dtype": config.dtype,
            "batch_size": settings.batch_size,
            "store_velocity": settings.store_velocity,
            **self.sampling,
        }

    @cached_property
    def _all_prompts(self) -> list[str]:
        return prompt_files.read(self.config.prompts)

    def index(self, num_videos: int) -> Index:
        """Of a collection of that many videos, or of all prompts if 0."""
        sampling = self.sampling
        sigmas = pipeline.Settings(**sampling).sigmas()
        size = (sampling[name] for name in ("height", "width", "num_frames"))
        num_prompts = min(len(self._all_prompts), num_videos or len(self._all_prompts))
        tokens = self.checkpoint.tokenizer.encode(self._prompts(num_prompts))[0].shape[1]
        return Index(
            made=self.made,
            sigmas=tuple(sigmas.tolist()),
            latent_shape=pipeline.latent_shape(
                self.checkpoint.wan_config, self.checkpoint.vae_config, *size
            ),
            num_videos=num_videos,
            num_prompts=num_prompts,
            text_shape=(tokens, self.checkpoint.umt5_config.d_model),
        )

    def _prompts(self, num_prompts: int) -> list[str]:
        return [*self._all_prompts[:num_prompts], self.sampling["negative_prompt"]]

    def texts(self, index: Index) -> list[bytes]:
        """The embeddings of all prompts and of the negative one, as `Texts` takes them."""
        prompts = self._prompts(index.num_prompts)
        self._pipeline.encode(prompts)
        return [self._pipeline.texts[prompt].tobytes() for prompt in prompts]

    def prepare(self, index: Index, texts: Texts, params: Params | None = None) -> None:
        """Compiles the rollout; params: of the transformer, if they are on the device already."""
        self._index, self._texts = index, texts
        self._params = self._pipeline.transformer() if params is None else params
        rollout = make_rollout(
            self.checkpoint.wan_config,
            np.asarray(index.sigmas),
            self.sampling["sampler"],
            self.sampling["guidance_scale"],
            jnp.dtype(self.config.dtype),
            self._placement.layout,
        )
        self._rollout = rollout.lower(self._params, *self._inputs(0)[2:]).compile()

    def _inputs(self, first: int):
        batch, shape = self.settings.batch_size, self._index.latent_shape
        videos = np.arange(first, first + batch)
        seeds = (self.config.seed * 1_000_003 + videos) % 2**32
        prompts = videos % self._index.num_prompts
        ids = [*prompts.tolist(), *[self._texts.negative] * batch]
        texts, lengths = zip(*(self._texts[i] for i in ids), strict=True)
        arrays = pipeline.noise(seeds, shape), np.stack(texts), np.asarray(lengths)
        return seeds.tolist(), prompts.tolist(), *self._placement.everywhere(arrays)

    def trajectories(self, first: int) -> Trajectories:
        """Those of `batch_size` videos from number `first` on, on the host."""
        seeds, prompts, *arrays = self._inputs(first)
        seen = self._rollout(self._params, *arrays)
        return Trajectories(*whole(seen), prompts, seeds)

    def operations(self, index: Index) -> int:
        """Floating-point operations of one video: both halves of guidance, all steps."""
        config = self.checkpoint.wan_config
        tokens = flops.video_tokens(config, index.latent_shape)
        return 2 * index.steps * flops.forward(config, tokens, (), index.text_shape[0])


def model_made(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which model made pairs: its sizes, and marks of its weights."""
    marks = {part: turns.mark(checkpoint, part) for part in ("transformer", "text_encoder")}
    return {"sizes": checkpoint.wan_config.to_dict(), **marks}


def pairs_folder(config, workdir: Path) -> epath.Path:
    """Where the pairs lie."""
    return epath.Path(config.collect.folder or Path(workdir) / "pairs")


def run(
    config, workdir: Path, process_index: int | None = None, process_count: int | None = None
) -> None:
    """Makes the files of pairs that are missing or damaged; the others are kept.

    They are dealt to the processes, which share the folder (None: to those of JAX); the first also
    writes index and texts. Each works on the devices of its own host.
    UserError if the folder holds pairs of another kind, or its disk is too small.
    """
    check(config)
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if config.collect.mode == "online":
        return
    teacher, folder = Teacher(config), pairs_folder(config, workdir)
    index = planned(teacher, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0:
        trajectories.write_index(folder, index)
    everything = range(index.num_shards)
    unfinished = trajectories.unfinished(folder, everything)
    missing = [number for number in unfinished if number % process_count == process_index]
    if missing:
        announce(teacher, folder, index, unfinished, missing)
    texts = stored_texts(teacher, folder, index, write=process_index == 0)
    if not missing:
        return
    teacher.prepare(index, texts)
    make_shards(teacher, folder, index, missing, len(everything[process_index::process_count]))


def check(config) -> None:
    """UserError for settings of `config.collect` that cannot be."""
    settings = config.collect
    for name, known in (("mode", MODES), ("store_velocity", tuple(trajectories.FIELDS))):
        if settings[name] not in known:
            raise UserError(
                f"collect.{name} is {settings[name]!r}: choose one of {', '.join(known)}."
            )
    check_counts("collect", settings, ("num_videos", "batch_size", "buffer"))
    if settings.reuse <= 0:
        raise UserError(f"collect.reuse is {settings.reuse}: choose a number above 0.")
    if settings.folder and records.is_local(epath.Path(settings.folder)):
        folders.check_writable(Path(settings.folder), "--config.collect.folder")


def planned(teacher: Teacher, folder: epath.Path) -> Index:
    """The index of the whole collection; one that is there may be extended by more videos.

    UserError if what is there was made otherwise.
    """
    there = trajectories.read_index(folder)
    settings = teacher.settings
    videos = -(-settings.num_videos // settings.batch_size) * settings.batch_size
    if there is None:
        return teacher.index(videos)
    refuse(folder, there, teacher.made, tuple(teacher.made))
    return teacher.index(max(videos, there.num_videos))


def refuse(folder: epath.Path, there: Index, made: dict[str, Any], names: Sequence[str]) -> None:
    """UserError if pairs were made otherwise, saying in what."""
    if told := trajectories.differences(there.made, made, names):
        raise UserError(
            f"{folder} holds pairs that were made otherwise ({told}): choose another folder by "
            "--workdir or --config.collect.folder, or delete it."
        )


def stored_texts(teacher: Teacher, folder: epath.Path, index: Index, write: bool) -> Texts:
    """The text embeddings of the collection, from its folder if they are there."""
    path, count = trajectories.text_path(folder), index.num_prompts + 1
    source: Sequence[bytes]
    if records.count(path) == count:
        source = records.Reader([path], count)
    else:
        source = teacher.texts(index)
        if write:
            records.write(path, source)
    return Texts(source, index.text_shape, index.made["dtype"])


def announce(
    teacher: Teacher,
    folder: epath.Path,
    index: Index,
    unfinished: Sequence[int],
    missing: Sequence[int],
) -> None:
    """Prints what will be made, and what it takes; UserError if the disk is too small for it."""
    if damaged := [i for i in unfinished if trajectories.shard_path(folder, i).exists()]:
        names = ", ".join(trajectories.shard_path(folder, i).name for i in damaged)
        print(f"collect: {names} cannot be read or were never finished, and are made again")
    size = len(unfinished) * index.shard_bytes
    pairs = len(unfinished) * teacher.settings.batch_size * index.steps
    share = "" if len(missing) == len(unfinished) else f", {len(missing)} by this process"
    print(
        f"collect: {pairs:,} pairs in {len(unfinished)} files of {index.shard_bytes / 1e9:,.3g} GB"
        f"{share}: {size / 1e9:,.3g} GB on disk, "
        f"{teacher.operations(index) / 1e15:,.3g} PFLOP a video"
    )
    if records.is_local(folder):
        folders.check_space(Path(folder), size)


def make_shards(
    teacher: Teacher, folder: epath.Path, index: Index, missing: Sequence[int], total: int
) -> None:
    """Makes and writes these files, each while the next is made; of `total`, the rest is done."""
    batch, writing = teacher.settings.batch_size, None
    done = total - len(missing)
    with (
        ThreadPoolExecutor(1) as writer,
        Progress("collect", total * batch, done * batch, unit="video") as progress,
    ):
        for count, number in enumerate(missing, 1):
            if records.is_local(folder):
                folders.check_space(Path(folder), index.shard_bytes)
            began = time.perf_counter()
            made = teacher.trajectories(number * batch)
            seconds = time.perf_counter() - began
            if count == 1 and len(missing) > 1:
                rest = seconds * (len(missing) - 1)
                print(
                    f"collect: {seconds:,.1f} s for the first file's {batch} videos, so the other "
                    f"{len(missing) - 1} take about {rest / 60:,.1f} min"
                )
            finished(writing)
            writing = writer.submit(trajectories.write_shard, folder, number, index, made, seconds)
            progress.update((done + count) * batch)
        finished(writing)


def finished(writing: Future | None) -> None:
    """Waits for a write, and raises what it raised."""
    if writing is not None:
        writing.result()


def opened(
    config,
    workdir: Path,
    teacher: Checkpoint,
    batch_size: int,
    placement: Placement | None = None,
) -> trajectories.Pairs | online.Pairs:
    """The pairs for a training in batches of that size, stored or made online on `placement`.

    UserError if they are not there, or not of this teacher.
    """
    check(config)
    if config.collect.mode == "online":
        return made_online(config, teacher, batch_size, placement)
    folder = pairs_folder(config, workdir)
    pairs = trajectories.open_folder(folder)
    sampling = teacher.sampling | config.collect.sampling.to_dict()
    refuse(folder, pairs.index, model_made(teacher) | sampling, MODEL)
    wanted = min(config.collect.num_videos, pairs.num_videos)
    return pairs.part(range(wanted))


def made_online(
    config, checkpoint: Checkpoint, batch_size: int, placement: Placement | None
) -> online.Pairs:
    """Pairs that the teacher makes while a student trains in batches of that size."""
    settings = config.collect
    teacher = Teacher(config, placement)
    index = teacher.index(0)
    index.made["store_velocity"] = "both"
    texts = Texts(teacher.texts(index), index.text_shape, index.made["dtype"])
    teacher.prepare(index, texts, checkpoint.transformer)
    pairs = settings.batch_size * index.steps
    updates = max(1, round(settings.reuse * pairs / batch_size))
    print(
        f"online: the teacher makes {settings.batch_size} videos every {updates} updates; "
        f"{settings.buffer} such rounds, {settings.buffer * index.shard_bytes / 1e9:,.3g} GB, are "
        "in memory"
    )
    return online.Pairs(index, texts, teacher.trajectories, settings.buffer, updates)
