"""How near a video is to another one of the same noise: PSNR and SSIM, frame by frame."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

_MOST = 100.0  # dB, of equal frames
_K1, _K2 = 0.01, 0.03  # of the paper
_RADIUS, _SIGMA = 5, 1.5  # of its window, 11 x 11


def psnr(
    ours: UInt8[np.ndarray, "frames height width 3"],
    theirs: UInt8[np.ndarray, "frames height width 3"],
) -> float:
    """Peak signal to noise in dB, the mean over the frames; equal frames count as 100."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        error = np.mean(np.square(a.astype(np.float64) - b))
        found.append(min(_MOST, 10 * np.log10(255.0**2 / max(error, 1e-12))))
    return float(np.mean(found))


def ssim(
    ours: UInt8[np.ndarray, "frames height width 3"],
    theirs: UInt8[np.ndarray, "frames height width 3"],
) -> float:
    """Structural similarity, the mean over frames and colours; 1 is equal.

    Wang et al. 2004: a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01 and K2 = 0.03, and only
    windows inside the frame, whose sides are at least 11 px.
    """
    return float(np.mean([_ssim(a, b) for a, b in zip(ours, theirs, strict=True)]))


def _ssim(a: UInt8[np.ndarray, "height width 3"], b: UInt8[np.ndarray, "height width 3"]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    mean_a, mean_b = _window(a), _window(b)
    variance_a = _window(a * a) - mean_a**2
    variance_b = _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float(np.mean(light * structure))


def _window(x: Float[np.ndarray, "height width 3"]) -> Float[np.ndarray, "rows columns 3"]:
    taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    for axis in (0, 1):
        x = correlate1d(x, taps / taps.sum(), axis)
    return x[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
