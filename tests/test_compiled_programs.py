"""Where compiled programs are kept, and who decides it."""

import jax
import pytest

from linvideo_jax import compiled_programs


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
    """cache_dir() of a program that starts in a home of its own."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def start():
        compiled_programs.keep_on_disk()
        return jax.config.jax_compilation_cache_dir

    yield start
    jax.config.update("jax_compilation_cache_dir", before)


def test_in_the_users_cache_folder(cache_dir, tmp_path):
    assert cache_dir() == str(tmp_path / "cache" / "linvideo_jax" / "compiled_programs")


@pytest.mark.parametrize("theirs", ["", "/elsewhere"])
def test_the_variable_of_jax_goes_before(cache_dir, monkeypatch, tmp_path, theirs):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", theirs)
    assert cache_dir() is None and not (tmp_path / "cache").exists()


def test_without_a_folder_to_write_to(cache_dir, tmp_path):
    (tmp_path / "cache").write_text("")
    assert cache_dir() is None


def double(x, *, times=2):
    return times * x


def test_options_are_those_of_the_backend(monkeypatch):
    """One that XLA does not know is refused, so it has arrived."""
    monkeypatch.setattr(compiled_programs, "OPTIONS", {"cpu": {"no_such_option": True}})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compiled_programs.jit(double)(1.0)
    monkeypatch.setattr(compiled_programs, "OPTIONS", {"tpu": {"no_such_option": True}})
    program = compiled_programs.jit(double, static_argnames="times")
    assert program(3.0, times=3) == 9
    assert program.lower(3.0, times=4).compile()(3.0) == 12


def test_this_version_knows_the_options_of_gpus():
    """All backends read the same ones, and a CPU has no use for these."""
    assert jax.jit(double, compiler_options=compiled_programs.OPTIONS["gpu"])(2.0) == 4
