"""The VAE of wan-digits: reconstruction of rendered clips, with a light prior on the latents."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from linvideo_jax import loop, optimizers
from linvideo_jax.data import digits
from linvideo_jax.models import module
from linvideo_jax.models.vae import VAEConfig, WanVAE

POOL = 65_536  # clips whose attributes wait on the device
ENCODER = ("encoder", "quant_conv")


def reconstruction_losses(video, mask, decoded, mean, logvar, digit_weight, kl_weight):
    """Loss and its parts: squared error, digit pixels weighted more, and KL a latent element."""
    error = jnp.mean(jnp.square(video - decoded), axis=-1)
    weight = 1.0 + digit_weight * mask
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    loss = jnp.sum(error * weight) / jnp.sum(weight) + kl_weight * kl
    parts = {
        "loss": loss,
        "kl": kl,
        "psnr": psnr(jnp.mean(error)),
        "psnr_digits": psnr(jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1.0)),
    }
    return loss, parts


def psnr(mean_square_error):
    """Peak signal to noise in dB of values in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_square_error, 1e-10))


def train(settings, config: VAEConfig, folder: Path, seed: int, params=None):
    """Trains from `params` (or anew) and returns float32 parameters.

    With `settings.freeze_encoder` the decoder alone learns: the latents, and so a transformer
    that was trained on them, stay as they are.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0, b2=0.99))
    pool = digits.sample_attributes(np.random.default_rng(seed), POOL, settings.num_frames)
    data = jax.device_put((pool, digits.digit_images()))
    dtype = jnp.dtype(settings.dtype)

    @jax.jit
    def update(state, data, learning_rate, key):
        attributes, images = data
        rows = jax.random.randint(key, (settings.batch_size,), 0, POOL)
        video, mask = digits.render(attributes.take(rows), images, settings.num_frames, mask=True)

        def loss(params):
            if settings.freeze_encoder:
                params = params | jax.lax.stop_gradient({k: params[k] for k in ENCODER})
            vae = module.bind(WanVAE, config, params)
            mean, logvar = vae.encode(video, dtype=dtype)
            noise = jax.random.normal(jax.random.fold_in(key, 1), mean.shape)
            latents = mean + jnp.exp(0.5 * logvar) * noise
            decoded = vae.decode(latents, dtype=dtype)
            return reconstruction_losses(
                video, mask, decoded, mean, logvar, settings.digit_weight, settings.kl_weight
            )

        grads, metrics = jax.grad(loss, has_aux=True)(state["params"])
        changes, moments = optimizer.update(grads, state["optimizer"])
        params = optimizers.apply(state["params"], changes, learning_rate)
        return {"params": params, "optimizer": moments}, metrics

    params = module.init(WanVAE, config, seed) if params is None else params
    params = jax.tree.map(jnp.asarray, params)
    start = {"params": params, "optimizer": optimizer.init(params)}
    key = jax.random.key(seed)
    num_steps = loop.steps_within(
        settings.minutes,
        settings.num_steps,
        folder,
        lambda step: update(start, data, 0.0, jax.random.fold_in(key, step)),
    )
    schedule = optimizers.warmup_cosine(settings.learning_rate, num_steps, 100, 0.01)
    state = loop.run(
        "vae",
        lambda state, step: update(state, data, schedule(step), jax.random.fold_in(key, step)),
        start,
        num_steps=num_steps,
        folder=folder,
        save_every=settings.save_every,
        log_every=settings.log_every,
    )
    return state["params"]


def encoder(config: VAEConfig, num_frames: int, dtype):
    """A jitted (params, attributes, images) -> latent means [clips, f, h, w, z], not normalised."""

    @jax.jit
    def encode(params, attributes, images):
        video = digits.render(attributes, images, num_frames)
        return module.bind(WanVAE, config, params).encode(video, dtype=dtype)[0]

    return encode


def with_statistics(params, config: VAEConfig, seed: int, clips: int) -> VAEConfig:
    """The configuration with mean and deviation of each latent channel over fresh clips."""
    encode = encoder(config, 25, jnp.float32)
    attributes = digits.sample_attributes(np.random.default_rng(seed + 1), clips)
    latents = np.concatenate(
        [
            np.asarray(encode(params, attributes.take(slice(i, i + 32)), digits.digit_images()))
            for i in range(0, clips, 32)
        ]
    ).reshape(-1, config.z_dim)
    return replace(
        config,
        latents_mean=tuple(latents.mean(0).round(4).tolist()),
        latents_std=tuple(latents.std(0).round(4).tolist()),
    )


def validate(params, config: VAEConfig, seed: int, clips: int) -> dict[str, float]:
    """PSNR in dB, overall and on digit pixels, of held-out clips (float32, means)."""
    images = digits.digit_images()

    @jax.jit
    def errors(params, attributes):
        video, mask = digits.render(attributes, images, 25, mask=True)
        vae = module.bind(WanVAE, config, params)
        error = jnp.mean(jnp.square(video - vae.decode(vae.encode(video)[0])), axis=-1)
        return jnp.mean(error), jnp.sum(error * mask), jnp.sum(mask)

    attributes = digits.sample_attributes(np.random.default_rng(seed + 2), clips, 25, "test")
    parts = [errors(params, attributes.take(slice(i, i + 16))) for i in range(0, clips, 16)]
    overall, on_digits, pixels = np.asarray(jax.device_get(parts)).T
    return {
        "psnr": float(psnr(overall.mean())),
        "psnr_digits": float(psnr(on_digits.sum() / pixels.sum())),
    }
