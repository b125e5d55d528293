"""The digits classifiers, on pixels and on latents, from scratch; their ceilings on real clips."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from linvideo_jax.metrics import classifier, classifier_training
from linvideo_jax.models import vae
from linvideo_jax.models.module import bind
from linvideo_jax.models.vae import VAEConfig, WanVAE
from linvideo_jax.progress import Progress


def train(settings, config: VAEConfig, vae_params, folder: Path, seed: int) -> None:
    """Writes FOLDER/{pixels,latents}.safetensors and config.json with their figures.

    The figures are agreements with the truth on held-out real clips: of pixels as rendered and
    after the VAE's round trip, and of latents, at both lengths.
    """
    dtype = jnp.dtype(settings.dtype)
    vae_params = jax.tree.map(jnp.asarray, vae_params)

    def encode(video):
        latents = bind(WanVAE, config, vae_params).encode(video, dtype=dtype)[0]
        return vae.normalize(latents.astype(jnp.float32), config)

    def round_trip(video):
        model = bind(WanVAE, config, vae_params)
        decoded = model.decode(model.encode(video, dtype=dtype)[0], dtype=dtype)
        return jnp.clip(decoded.astype(jnp.float32), -1.0, 1.0)

    kinds = {
        "pixels": (classifier.PIXELS, None, {"clean": None, "round_trip": round_trip}),
        "latents": (classifier.LATENTS, encode, {"clean": encode}),
    }
    for kind, (sizes, inputs, views) in kinds.items():
        sizes, own = replace(sizes, dtype=settings.dtype), settings[kind]
        with Progress(f"classifier of {kind}", own.num_steps) as bar:
            params = classifier_training.train(
                sizes,
                own.num_steps,
                own.batch_size,
                encode=inputs,
                num_frames=tuple(own.num_frames),
                pool_clips=own.pool_clips or None,
                seed=seed,
                progress=lambda step, loss, right, bar=bar: bar.update(
                    step, f"loss {loss:.3f} right {right:.3f}"
                ),
            )
        figures = {
            f"{name}_{frames}_frames": classifier_training.validate(
                params, sizes, encode=view, num_clips=own.validation_clips, num_frames=frames
            )
            for name, view in views.items()
            for frames in own.num_frames
        }
        logging.info("classifier of %s: %s", kind, {k: v["all"] for k, v in figures.items()})
        classifier.save(folder, kind, jax.device_get(params), sizes, figures)
