"""Decoding by tiles, and by pieces in time, against decoding whole."""

import itertools

import numpy as np
import pytest

from linvideo_jax.models import vae as vae_module
from linvideo_jax.models.module import bind, init
from linvideo_jax.models.vae import VAEConfig, WanVAE, pixels
from linvideo_jax.models.vae_tiles import decode_tiles, tile_starts

TINY = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)


@pytest.fixture(scope="module")
def vae():
    return bind(WanVAE, TINY, init(WanVAE, TINY))


def latents(height, width, frames=2):
    rng = np.random.default_rng(0)
    return rng.normal(size=(1, frames, height, width, 4)).astype(np.float32)


def test_pieces_are_the_whole_and_come_before_the_last_is_decoded(vae, monkeypatch):
    x, begun, step = latents(5, 7, frames=6), [], vae_module._pixels_step
    monkeypatch.setattr(
        vae_module, "_pixels_step", lambda *inputs: begun.append(inputs) or step(*inputs)
    )
    pieces = vae.decode_pixels(x)
    first = next(pieces)
    assert len(begun) == 3, "the piece, and two that the device decodes while it is used"
    made = [first, *pieces]
    assert [type(piece) for piece in made] == [np.ndarray] * 6 and len(begun) == 6
    np.testing.assert_array_equal(np.concatenate(made, axis=1), pixels(vae.decode_chunks(x)))


def test_tiles_cover_and_overlap():
    for length in range(1, 60):
        starts = tile_starts(length, 12, 4)
        assert starts[0] == 0 and max(starts) + 12 >= length
        assert all(b - a <= 8 for a, b in itertools.pairwise(starts))
        if length > 12:
            assert starts[-1] + 12 == length


def test_one_tile_is_the_whole(vae):
    x = latents(13, 29)
    np.testing.assert_allclose(decode_tiles(vae, x, 29, 3), vae.decode_chunks(x), atol=1e-5)


def test_tiles_blend_into_the_whole(vae):
    x = latents(13, 29)
    whole, tiled = np.asarray(vae.decode_chunks(x)), decode_tiles(vae, x, 20, 12)
    assert tiled.shape == whole.shape and tiled.dtype == np.float32
    difference = np.abs(tiled - whole)
    assert difference.max() < 0.02 and difference.mean() < 1e-3 < 0.1 * whole.std()


def test_wrong_overlap(vae):
    with pytest.raises(ValueError, match="overlap < tile"):
        decode_tiles(vae, latents(5, 7), 4, 4)
