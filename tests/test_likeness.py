"""PSNR, SSIM and motion of videos that nothing is known of, against closed forms and loops."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from linvideo_jax.metrics import flow, likeness


def textured(height, width, seed=0, sigma=1.5):
    """A picture of uint8 with detail everywhere, no two places alike."""
    rng = np.random.default_rng(seed)
    picture = gaussian_filter(rng.normal(size=(height, width, 3)), (sigma, sigma, 0))
    return ((picture - picture.min()) / np.ptp(picture) * 255).astype(np.uint8)


def test_psnr():
    a = np.full((2, 13, 17, 3), 100, np.uint8)
    b = a.copy()
    b[0], b[1] = 110, 105
    # The mean of the frames' own, not of their errors.
    wanted = (10 * np.log10(255**2 / 100) + 10 * np.log10(255**2 / 25)) / 2
    assert likeness.psnr(a, b) == pytest.approx(wanted)
    assert likeness.psnr(a, a) == 100.0 and likeness.ssim(a, a) == pytest.approx(1.0)


def test_ssim_of_flat_frames_and_against_loops():
    a, b = (np.full((1, 12, 15, 3), value, np.uint8) for value in (60, 90))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    wanted = (2 * 60 * 90 + c1) / (60**2 + 90**2 + c1)
    assert likeness.ssim(a, b) == pytest.approx(wanted)

    rng = np.random.default_rng(0)
    x = textured(13, 14)
    y = np.clip(x + rng.normal(scale=20, size=x.shape), 0, 255).astype(np.uint8)
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(taps, taps) / taps.sum() ** 2
    found = []
    for top in range(3):
        for left in range(4):
            for channel in range(3):
                u, v = (
                    image[top : top + 11, left : left + 11, channel].astype(float)
                    for image in (x, y)
                )
                mu, mv = (weights * u).sum(), (weights * v).sum()
                su, sv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
                suv = (weights * (u - mu) * (v - mv)).sum()
                top_, low = (2 * mu * mv + c1) * (2 * suv + c2), (mu**2 + mv**2 + c1)
                found.append(top_ / (low * (su + sv + c2)))
    assert likeness.ssim(x[None], y[None]) == pytest.approx(np.mean(found), rel=1e-9)


def sliding(step, frames=9, size=(128, 160)):
    """A window that moves over a picture by `step` px (down, right) a frame."""
    far = [abs(s) * frames for s in step]
    picture = textured(size[0] + far[0], size[1] + far[1])
    clips = []
    for i in range(frames):
        y, x = (i * s if s >= 0 else f + i * s for s, f in zip(step, far, strict=True))
        clips.append(picture[y : y + size[0], x : x + size[1]])
    return np.stack(clips)


@pytest.mark.parametrize("step", [(0, 0), (2, -3), (0, 1)])
def test_flow_finds_a_known_motion(step):
    found = flow.flows(sliding(step), fps=8)
    assert found.shape == (8, 128, 160, 2)
    # A window moving right sees the picture move left; 128 px stand for 256.
    inside = found[:, 12:-12, 12:-12]
    wanted = -2 * np.array(step)
    assert np.mean(np.all(inside == wanted, axis=-1)) > 0.97
    assert flow.speed(inside) == pytest.approx(np.hypot(*wanted), abs=0.2)
    assert flow.smoothness(inside) > 0.9
    assert flow.is_dynamic(found) == (np.hypot(*wanted) > 6)


def test_every_second_frame_at_16_a_second():
    clip = sliding((0, 2), frames=9)
    np.testing.assert_array_equal(flow.flows(clip, 16), flow.flows(clip[::2], 8))


def test_what_is_flat_stands_still_and_jitter_is_not_smooth():
    flat = np.random.default_rng(0).normal(120, 0.4, (5, 64, 64, 3)).round().astype(np.uint8)
    assert flow.speed(flow.flows(flat, 8)) == 0.0
    smooth = sliding((0, 2), frames=8)
    jitter = smooth[[0, 3, 1, 4, 2, 5, 3, 6]]
    found = [flow.smoothness(flow.flows(clip, 8)) for clip in (smooth, jitter)]
    assert found[1] < 0.3 < found[0], found


def test_a_large_frame_is_looked_at_small_and_short_clips_have_no_figure():
    clip = sliding((0, 8), frames=3, size=(256, 320))  # 8 px of 256: 4 of 128
    found = flow.flows(clip, 8)
    assert found.shape == (2, 128, 160, 2)
    inside = np.median(found[:, 20:-20, 20:-20].reshape(-1, 2), axis=0)
    np.testing.assert_array_equal(inside, [0, -8])
    assert np.isnan(flow.smoothness(flow.flows(clip[:2], 8)))
    assert np.isnan(flow.speed(flow.flows(clip[:1], 8)))
    assert not flow.is_dynamic(flow.flows(clip[:1], 8))
