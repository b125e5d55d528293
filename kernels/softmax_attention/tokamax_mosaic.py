"""Softmax attention by tokamax's Mosaic kernel (NVIDIA Hopper, 16-bit inputs)."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from kernels.dispatch import platform
from kernels.gpu import target
from kernels.softmax_attention import tokamax_configs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_log = logging.getLogger(__name__)


def import_early() -> None:
    """Imports tokamax, if this machine has it and JAX's plugin for NVIDIA GPUs.

    It registers settings of its own with JAX, which JAX's caches of traced functions go by: first
    imported while a function is traced, it makes JAX trace and compile that function once more at
    its second call (23 s for an update of Wan 1.3B).
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, plugins)):
        return
    try:
        _package()
    except NotImplementedError as refusal:
        _log.info("tokamax: %s", refusal)


def _package() -> ModuleType:
    """tokamax. Raises: NotImplementedError without it."""
    try:
        import tokamax
    except ImportError as error:
        raise NotImplementedError(
            f"needs the package tokamax, which needs Python 3.12 or newer: {error}"
        ) from error
    return tokamax


import_early()


def softmax_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """See `interface.softmax_attention`.

    Raises: NotImplementedError off Hopper, for 32-bit inputs, for a head_dim other than 64 and
    128, for a bias, without the package tokamax, and where tokamax itself refuses.
    """
    check(q, bias)
    config = tokamax_configs.choose(target(), tokamax_configs.Layer.of(q, k))
    if config is not None and (kernel := configured(q, k, v, config)) is not None:
        return kernel(q, k, v)
    return _package().dot_product_attention(q, k, v, implementation="mosaic")


def configured(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    config: Mapping[str, Any],
) -> Callable[..., Float[Array, "batch tokens heads head_dim"]] | None:
    """tokamax's kernel for arrays of these shapes with fields of its configuration replaced.

    None where this version of tokamax has no such kernel or no such fields.
    """
    try:
        # What "mosaic" stands for; its public name in tokamax.ops.gpu needs jax_triton too.
        from tokamax._src.ops.attention.api import IMPLEMENTATIONS

        kernel = IMPLEMENTATIONS["mosaic_gpu"]
        fields = dataclasses.replace(kernel.bind(q, k, v).heuristics_config, **config)
    except (ImportError, LookupError, AttributeError, TypeError, ValueError) as error:
        _log.info("tokamax decides itself how its kernel is divided: %s", error)
        return None
    return kernel.replace(config=fields)


def check(
    q: Float[Array, "batch tokens heads head_dim"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None,
) -> None:
    """Raises: as `softmax_attention`, but for tokamax's own refusals."""
    if platform() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {platform()}")
    gpu = target()
    if gpu.capability != 9.0:
        raise NotImplementedError(f"needs a Hopper GPU, this is {gpu.kind}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] not in (64, 128):
        raise NotImplementedError(f"needs head_dim 64 or 128, got {q.shape[-1]}")
    if bias is not None:
        raise NotImplementedError("is not used with a bias, whose gradient it would compute")
    _package()
