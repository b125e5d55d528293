"""Compiled programs are kept on disk: a second start of the same program does not compile again."""

import os

import jax

from linvideo_jax import folders


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
