"""Which stage of a configuration is planned."""

from linvideo_jax.plan.of_distill import Distill
from linvideo_jax.plan.of_transfer import Transfer
from linvideo_jax.plan.stage import Stage


def of(config) -> Stage:
    """Stage distill of a configuration that names it, else stage transfer.

    UserError for a configuration with neither.
    """
    return Distill(config) if "distill" in config.stages else Transfer(config)
