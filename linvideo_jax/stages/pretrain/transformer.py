"""Text encoder and video transformer of wan-digits, trained together by rectified flow."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from linvideo_jax import loop, optimizers
from linvideo_jax.data import captions, digits
from linvideo_jax.errors import UserError
from linvideo_jax.flow import rectified
from linvideo_jax.models import module, vae
from linvideo_jax.models.remat import POLICIES
from linvideo_jax.models.umt5 import UMT5Encoder
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.progress import Progress
from linvideo_jax.stages.pretrain.vae import encoder

Data = dict[str, jax.Array]


def check(settings) -> None:
    """UserError for settings with which some step has no clips, or for an unknown remat."""
    turns = [size.every for size in settings.sizes.values() if size.num_clips]
    if min(turns, default=0) != 1:
        raise UserError(
            "pretrain.transformer.sizes leaves steps without clips: of the sizes with num_clips "
            "above 0 one needs every=1, and none may have less."
        )
    if settings.remat not in POLICIES:
        raise UserError(
            f"pretrain.transformer.remat is {settings.remat!r}: choose one of "
            f"{', '.join(POLICIES)}."
        )


def make_data(settings, size, sizes, vae_params, tokenizer, seed: int) -> Data:
    """Clips of one size as normalised latents and captions as token ids, on the device."""
    rng = np.random.default_rng([seed, size.num_frames])
    attributes = digits.sample_attributes(rng, size.num_clips, size.num_frames)
    with ThreadPoolExecutor(1) as beside:
        # Captions keep one core busy for about as long as the clips keep the device.
        tokens = beside.submit(_tokens, settings, attributes, tokenizer, rng)
        latents = _latents(settings, size, sizes, vae_params, attributes)
        ids, lengths = tokens.result()
    empty_ids, empty_length = tokenizer.encode([""])
    return {
        "latents": latents,
        "ids": jnp.asarray(ids, jnp.int32),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "empty_ids": jnp.asarray(np.pad(empty_ids[0, :1], (0, ids.shape[-1] - 1)), jnp.int32),
        "empty_length": jnp.asarray(empty_length[0], jnp.int32),
    }


def _tokens(settings, attributes, tokenizer, rng):
    """Ids [clips, captions, tokens] and lengths [clips, captions] of several wordings a clip."""
    ids, lengths = zip(
        *(
            tokenizer.encode(captions.captions(attributes, rng))
            for _ in range(settings.captions_per_clip)
        ),
        strict=True,
    )
    width = max(array.shape[1] for array in ids)
    ids = [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in ids]
    return np.stack(ids, 1), np.stack(lengths, 1)


def _latents(settings, size, sizes, vae_params, attributes):
    """Normalised latents of the clips, bfloat16, on the device."""
    encode = encoder(sizes.vae, size.num_frames, jnp.dtype(settings.dtype))
    normalize = jax.jit(lambda latents: vae.normalize(latents, sizes.vae).astype(jnp.bfloat16))
    images, latents = jax.device_put(digits.digit_images()), []
    batch = settings.encode_batch_size
    with Progress(f"latents of {size.num_frames} frames", size.num_clips) as progress:
        for start in range(0, size.num_clips, batch):
            rows = attributes.take(slice(start, start + batch))
            latents.append(normalize(encode(vae_params, rows, images)))
            if start // batch % 16 == 0:
                latents[-1].block_until_ready()
                progress.update(start + batch, "clips")
    return jnp.concatenate(latents)


def make_update(settings, sizes, optimizer, batch_size: int):
    """A jitted (state, data, step, learning_rate, key) -> (state, metrics) of rectified flow."""
    dtype = jnp.dtype(settings.dtype)

    def loss(params, data, key):
        keys = jax.random.split(key, 5)
        rows = jax.random.randint(keys[0], (batch_size,), 0, data["latents"].shape[0])
        wording = jax.random.randint(keys[1], (batch_size,), 0, data["ids"].shape[1])
        dropped = jax.random.bernoulli(keys[2], settings.caption_dropout, (batch_size,))
        ids = jnp.where(dropped[:, None], data["empty_ids"], data["ids"][rows, wording])
        lengths = jnp.where(dropped, data["empty_length"], data["lengths"][rows, wording])
        x0 = data["latents"][rows].astype(jnp.float32)
        noise = jax.random.normal(keys[3], x0.shape)
        t = rectified.shift_time(jax.random.uniform(keys[4], (batch_size,)), settings.flow_shift)
        text = module.bind(UMT5Encoder, sizes.text_encoder, params["text_encoder"])(
            ids, lengths, dtype=dtype
        )
        u = module.bind(WanTransformer, sizes.transformer, params["transformer"])(
            rectified.interpolate(x0, noise, t),
            1000.0 * t,
            text,
            lengths,
            dtype=dtype,
            remat=settings.remat,
        )
        return jnp.mean(jnp.square(u - (noise - x0)))

    @jax.jit
    def update(state, data, step, learning_rate, key):
        value, grads = jax.value_and_grad(loss)(state["params"], data, key)
        changes, moments = optimizer.update(grads, state["optimizer"], state["params"])
        params = optimizers.apply(state["params"], changes, learning_rate)
        ema = optimizers.moving_average(state["ema"], params, settings.ema_decay, step)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        return {"params": params, "ema": ema, "optimizer": moments}, metrics

    return update


def train(settings, sizes, vae_params, tokenizer, folder: Path, seed: int, params: Any):
    """Trains {"text_encoder", "transformer"} from `params`; returns their moving average.

    Sizes of clips take turns: one with `every` = k has each k-th step, the largest k first.
    The settings are those that `check` lets pass.
    """
    clip_sizes = [size for size in settings.sizes.values() if size.num_clips]
    datas = [make_data(settings, size, sizes, vae_params, tokenizer, seed) for size in clip_sizes]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizers.muon_with_adam())
    updates = [make_update(settings, sizes, optimizer, size.batch_size) for size in clip_sizes]
    key = jax.random.key(seed)

    def update(state, step, learning_rate):
        turns = [i for i, size in enumerate(clip_sizes) if step % size.every == size.every - 1]
        turn = max(turns, key=lambda i: clip_sizes[i].every)
        own_key = jax.random.fold_in(key, step)
        return updates[turn](state, datas[turn], step, learning_rate, own_key)

    params = jax.tree.map(jnp.asarray, params)
    start = {"params": params, "ema": params, "optimizer": optimizer.init(params)}
    num_steps = loop.steps_within(
        settings.minutes, settings.num_steps, folder, lambda step: update(start, step, 0.0)
    )
    schedule = optimizers.warmup_cosine(
        settings.learning_rate, num_steps, settings.lr_warmup_steps, 0.02
    )
    state = loop.run(
        "transformer",
        lambda state, step: update(state, step, schedule(step)),
        start,
        num_steps=num_steps,
        folder=folder,
        save_every=settings.save_every,
        log_every=settings.log_every,
    )
    return state["ema"]
