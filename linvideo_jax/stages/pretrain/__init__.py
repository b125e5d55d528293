"""Stage pretrain: the small model itself, trained on rendered clips: VAE, then text and video."""

from dataclasses import replace
from pathlib import Path

import jax
from absl import logging

from linvideo_jax import checkpoints, loop
from linvideo_jax.data import captions
from linvideo_jax.errors import UserError
from linvideo_jax.models import module, registry
from linvideo_jax.models.tokenizer import Tokenizer
from linvideo_jax.models.tokenizer_training import build
from linvideo_jax.models.umt5 import UMT5Encoder
from linvideo_jax.models.wan import WanTransformer
from linvideo_jax.stages.pretrain import classifier as classifier_training
from linvideo_jax.stages.pretrain import transformer as transformer_training
from linvideo_jax.stages.pretrain import vae as vae_training

PARTS = ("vae", "classifier", "transformer")


def run(config, workdir: Path) -> None:
    """Trains the parts named in `config.pretrain.parts` and writes `workdir/final`.

    With `config.checkpoint` the weights start from that folder, and parts not named are taken
    from it; the run may so be made in pieces, each from the weights of the last alone.
    """
    workdir, settings = Path(workdir), config.pretrain
    unknown = set(settings.parts) - set(PARTS)
    if unknown:
        raise UserError(f"pretrain.parts names {sorted(unknown)}; known are {', '.join(PARTS)}.")
    if "transformer" in settings.parts:
        transformer_training.check(settings.transformer)
    sizes = registry.sizes(config.model)
    start = checkpoints.load(config.checkpoint) if config.checkpoint else None
    if start:
        sizes = registry.ModelSizes(start.wan_config, start.vae_config, start.umt5_config)
    state = workdir / "state"

    vae_params = start.vae if start else None
    if "vae" in settings.parts:
        vae_params = vae_training.train(
            settings.vae, sizes.vae, state / "vae", config.seed, vae_params
        )
        clips = settings.vae.validation_clips
        if not settings.vae.freeze_encoder:
            fitted = vae_training.with_statistics(vae_params, sizes.vae, config.seed, clips)
            sizes = replace(sizes, vae=fitted)
        figures = vae_training.validate(vae_params, sizes.vae, config.seed, clips)
        logging.info("VAE on held-out clips: %s", figures)
        loop.write_json(workdir / "vae.json", figures)

    if "classifier" in settings.parts:
        classifier_training.train(
            settings.classifier, sizes.vae, vae_params, workdir / "classifier", config.seed
        )

    if start:
        tokenizer_folder, scheduler = start.tokenizer_folder, start.scheduler
        params = {"text_encoder": start.text_encoder, "transformer": start.transformer}
    else:
        tokenizer_folder, scheduler = workdir / "tokenizer", None
        if not (tokenizer_folder / "tokenizer.json").exists():
            build(captions.vocabulary(), tokenizer_folder)
        params = {
            "text_encoder": module.init(UMT5Encoder, sizes.text_encoder, config.seed),
            "transformer": module.init(WanTransformer, sizes.transformer, config.seed),
        }
    tokenizer = Tokenizer.load(tokenizer_folder)
    if "transformer" in settings.parts:
        params = transformer_training.train(
            settings.transformer,
            sizes,
            vae_params,
            tokenizer,
            state / "transformer",
            config.seed,
            params,
        )
    checkpoints.save(
        workdir / "final",
        config=checkpoints.make_config(
            sizes.transformer,
            sizes.vae,
            sizes.text_encoder,
            sampling=settings.sampling.to_dict(),
        ),
        transformer=jax.device_get(params["transformer"]),
        vae=jax.device_get(vae_params),
        text_encoder=jax.device_get(params["text_encoder"]),
        tokenizer=tokenizer_folder,
        scheduler=scheduler,
    )
