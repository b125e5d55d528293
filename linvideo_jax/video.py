"""Video files: mp4, animated gif and webp, strips of frames; each appears whole or not at all."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from linvideo_jax.folders import replacing

FPS = 16
# Flat-coloured clips of 96 px: crf 8 to 20 give 30.1 to 29.5 dB on digit pixels (the rest is the
# chroma subsampling of yuv420p) at 4.0 to 2.9 kB.
_H264 = {"crf": "12", "preset": "slow", "tune": "animation"}
_BT709, _LIMITED_RANGE = 1, 1  # H.264's own numbers; players guess the matrix of untagged files


def write_mp4(path: Path, video: UInt8[np.ndarray, "frames height width 3"], fps: int = FPS):
    """H.264, yuv420p, BT.709, playable while it downloads; height and width even."""
    height, width = video.shape[1:3]
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps), options=_H264)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for pixels in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_mp4(path: Path) -> UInt8[np.ndarray, "frames height width 3"]:
    """All frames of a video file; whatever PyAV raises if it is none."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def write_animation(path: Path, video: UInt8[np.ndarray, "frames height width 3"], fps: int = FPS):
    """An endless .gif or .webp, by the suffix of `path`."""
    first, *rest = [Image.fromarray(frame) for frame in video]
    options = {"quality": 80, "method": 6} if Path(path).suffix == ".webp" else {}
    with replacing(path) as temporary:
        first.save(
            temporary,
            format=Path(path).suffix[1:],
            save_all=True,
            append_images=rest,
            duration=round(1000 / fps),
            loop=0,
            **options,
        )


def strip(
    video: UInt8[np.ndarray, "frames height width 3"], count: int = 8
) -> UInt8[np.ndarray, "height count*width 3"]:
    """`count` frames, evenly spaced from the first to the last, side by side in one picture."""
    return np.concatenate(list(video[spread(len(video), count)]), axis=1)


def spread(num_frames: int, count: int) -> list[int]:
    """`count` indices of frames, evenly spaced from the first to the last."""
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def write_png(path: Path, picture: UInt8[np.ndarray, "height width 3"]):
    """One picture."""
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")
