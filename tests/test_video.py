"""Files that videos are written to, and read back from."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from PIL import Image

from linvideo_jax import video


def flat_clip():
    """A bright square of 32 px that crosses a dark green ground of 96 px."""
    clip = np.full((9, 96, 96, 3), (16, 84, 44), np.uint8)
    for t in range(9):
        clip[t, 32:64, 4 * t : 4 * t + 32] = (232, 32, 40)
    return clip


def test_mp4_keeps_colours_and_speed(tmp_path):
    clip = flat_clip()
    video.write_mp4(tmp_path / "a.mp4", clip)
    back = video.read_mp4(tmp_path / "a.mp4")
    assert back.shape == clip.shape and back.dtype == np.uint8
    assert np.abs(back[:, 36:60].astype(int) - clip[:, 36:60]).mean() < 4
    assert np.abs(back[4, 48, 32].astype(int) - (232, 32, 40)).max() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    video.write_mp4(tmp_path / "a.mp4", flat_clip())
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError):
        video.write_mp4(tmp_path / "a.mp4", flat_clip()[..., :2])
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_are_written_while_later_ones_are_made(tmp_path, monkeypatch):
    clip, encoded, reached = flat_clip(), [], threading.Event()

    class Watched:
        def reformat(self, frame, **options):
            encoded.append(frame.to_ndarray())
            reached.set()
            return frame.reformat(**options)

    def pieces():
        yield clip[:1]
        yield clip[1:5]
        assert reached.wait(60)
        yield clip[5:]

    monkeypatch.setattr(video, "VideoReformatter", Watched)
    with ThreadPoolExecutor(1) as writer:
        video.write_mp4_behind(writer, tmp_path / "a.mp4", pieces()).result()
    np.testing.assert_array_equal(encoded, clip)
    assert video.read_mp4(tmp_path / "a.mp4").shape == clip.shape


def test_an_error_of_either_side_ends_both(tmp_path):
    def interrupted():
        yield flat_clip()
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as writer:
        with pytest.raises(KeyboardInterrupt):
            video.write_mp4_behind(writer, tmp_path / "a.mp4", interrupted())
        with pytest.raises(FileNotFoundError):
            endless = itertools.repeat(flat_clip())
            video.write_mp4_behind(writer, tmp_path / "none" / "a.mp4", endless)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_play(tmp_path, suffix):
    clip = flat_clip()
    video.write_animation(tmp_path / f"a.{suffix}", clip)
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert (picture.n_frames, picture.size) == (len(clip), (96, 96))
        picture.seek(4)
        pixel = np.asarray(picture.convert("RGB"))[48, 32].astype(int)
        assert np.abs(pixel - clip[4, 48, 32]).max() < 30


def test_strip_shows_first_and_last_frame(tmp_path):
    clip = flat_clip()
    picture = video.strip(clip, 3)
    np.testing.assert_array_equal(picture, np.concatenate([clip[0], clip[4], clip[8]], axis=1))
    video.write_png(tmp_path / "s.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s.png")), picture)
