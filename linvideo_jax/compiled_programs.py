"""How programs are compiled, and where they are kept: a second start does not compile again."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from linvideo_jax import folders

# XLA's choice between its own matrix products and cuBLASLt's is made for the bare product; biases
# and the feed-forward's GELU then pass through memory once more, 1.4 GB a layer of 1.3B at 480p.
# With cuBLASLt alone they are part of the products.
OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for a program of the transformer without gradients, outside of any other jit.

    It is compiled with `OPTIONS` of the backend on which it is called. `.lower` is jax.jit's.
    """

    @functools.cache
    def jitted(backend: str) -> Any:
        return jax.jit(function, compiler_options=OPTIONS.get(backend), **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return jitted(jax.default_backend())(*args, **kwargs)

    call.lower = lambda *args, **kwargs: jitted(jax.default_backend()).lower(*args, **kwargs)
    return call


def keep_on_disk() -> None:
    """Keeps what takes a second or more to compile in the user's cache folder; call it first.

    JAX's own variable goes before: with JAX_COMPILATION_CACHE_DIR set it is that folder, and with
    an empty value none. The folder may be deleted at any time; one that cannot be written is done
    without.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    folder = folders.user_cache() / "compiled_programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
