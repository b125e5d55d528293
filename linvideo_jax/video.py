"""Video files: mp4, animated gif and webp, strips of frames; each appears whole or not at all."""

from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from fractions import Fraction
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image

from linvideo_jax.folders import replacing

FPS = 16
# Beside crf 12 of preset slow: two clips of wan-digits take 26 kB (21), 36.36 dB (36.39; most
# of the error is the chroma subsampling of yuv420p). 81 frames of 480 x 832 on one core: a moving
# gradient takes 0.6 s (1.7) and 127 kB (119), 44.25 dB (44.27); moving texture with grain 1.3 s
# (11.4) and 7.2 MB (7.2), 32.56 dB (32.90). Files of superfast are up to eight times as large.
_H264 = {"crf": "10", "preset": "veryfast", "tune": "animation"}
_BT709, _LIMITED_RANGE = 1, 1  # H.264's own numbers; players guess the matrix of untagged files


def write_mp4(path: Path, video: Iterable[UInt8[np.ndarray, "height width 3"]], fps: int = FPS):
    """H.264, yuv420p, BT.709, playable while it downloads; height and width even.

    `video`: an array of frames, or frames as they get ready.
    """
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps), options=_H264)
        frames = iter(video)
        first = next(frames)
        (stream.height, stream.width), stream.pix_fmt = first.shape[:2], "yuv420p"
        # PyAV's default is slices: with 15 of them that gradient takes 181 kB, with frames 139.
        stream.thread_type = "FRAME"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        reformatter = VideoReformatter()  # a frame's own would start threads for every frame
        for pixels in chain([first], frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_mp4_behind(
    writer: Executor, path: Path, pieces: Iterable[UInt8[np.ndarray, "frames height width 3"]]
) -> Future:
    """`write_mp4` in the thread of `writer`, while `pieces` are made in this one.

    Returns after the last piece; the file is there when the future is done. An error of either side
    ends the other, and leaves no file.
    """
    handed: SimpleQueue = SimpleQueue()
    try:
        writing = writer.submit(write_mp4, path, _frames(handed))
        for piece in pieces:
            if writing.done():
                writing.result()  # raises
            handed.put(piece)
        handed.put(None)
    except BaseException:
        handed.put(CancelledError())
        raise
    return writing


def _frames(handed: SimpleQueue) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    while (piece := handed.get()) is not None:
        if isinstance(piece, CancelledError):
            raise piece
        yield from piece


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
