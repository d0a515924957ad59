"""Users' videos: every frame once, in order, upright, at its time; and one line for what cannot be read."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from video_files import number, numbered, peak_growth, write, write_sound

from revseg_jax.data.container import declared_size
from revseg_jax.data.natural_order import natural
from revseg_jax.data.video import open_video
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.overlay import draw, write_video

REAL = sorted((Path(__file__).parents[2] / "shared/videos").glob("*.mp4"))
ONE = 1 << 16  # in a display matrix


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_video(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# --- frames, order, times


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}),
        ("fragments.mp4", "libx264", {"container": {"movflags": "frag_keyframe+empty_moov"}, "g": "7"}),
        ("a.mov", "mpeg4", {}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8"}),
        ("a.mkv", "ffv1", {}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("shuffled.avi", "libx264", {"bf": "3"}),  # FFmpeg tells the times of such a file out of order
        ("a.ts", "mpeg2video", {"bf": "2"}),
        ("raw.h264", "libx264", {}),  # without any times
        ("a.flv", "flv", {}),  # without durations
        ("444.mp4", "libx264", {"pixels": "yuv444p"}),
        ("10bit.mkv", "ffv1", {"pixels": "yuv420p10le"}),
    ],
)
def test_any_container_and_codec(tmp_path, name, codec, options):
    video = open_video(write(tmp_path / name, numbered(40), codec, **options))
    assert (len(video), video.height, video.width) == (40, 64, 128)
    assert [number(frame) for frame in video.frames()] == list(range(40))
    np.testing.assert_allclose(video.times, np.arange(40) / 30, atol=2e-3)
    assert float(video.duration) == pytest.approx(40 / 30, abs=3e-3)
    assert float(video.fps) == pytest.approx(30, rel=3e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate(tmp_path, name):
    pts = [1000, 1040, 1041, 1100, 1900, 1933, 5000]
    video = open_video(write(tmp_path / name, numbered(7), pts=pts, time_base=Fraction(1, 1000)))
    np.testing.assert_allclose(video.times, (np.array(pts) - 1000) / 1000, atol=1e-9)
    assert [number(frame) for frame in video.frames()] == list(range(7))
    assert video.duration > 4


def test_chosen_frames_in_one_pass_up_to_the_last(tmp_path, monkeypatch):
    video = open_video(write(tmp_path / "a.mp4", numbered(60)))
    assert [(i, number(frame)) for i, frame in video.read([50, 3, 3, 17])] == [(3, 3), (17, 17), (50, 50)]
    assert list(video.read([])) == []
    frame = next(video.read([20]))[1]
    assert frame.dtype == np.uint8 and frame.flags.c_contiguous
    whole = list(video.frames())
    np.testing.assert_array_equal(frame, whole[20])
    with pytest.raises(RunFailure, match="frame 60"):
        list(video.read([60]))


@pytest.mark.parametrize("size", [(1, 1), (47, 63), (2160, 3840)])
def test_one_frame_of_any_size(tmp_path, size):
    video = open_video(write(tmp_path / "a.mkv", numbered(1, *size), "ffv1", pixels="yuv444p"))
    assert (len(video), video.height, video.width) == (1, *size)
    assert next(video.frames()).shape == (*size, 3)
    assert video.times.tolist() == [0] and 0 < video.duration < 1


def test_colours(tmp_path):
    frames = np.empty((3, 64, 64, 3), np.uint8)
    frames[:] = np.array([[200, 40, 40], [40, 190, 60], [30, 60, 210]])[:, None, None]
    video = open_video(write(tmp_path / "a.mp4", frames))
    for frame, shown in zip(frames, video.frames(), strict=True):
        assert np.abs(shown.astype(int) - frame).max() <= 6


def test_memory_does_not_grow_with_length(tmp_path):
    frame, grown = numbered(1, 256, 256), {}
    for count in (20, 40, 400):  # the first one loads what has to be loaded
        path = write(tmp_path / f"{count}.mp4", np.broadcast_to(frame, (count, 256, 256, 3)), preset="ultrafast")
        grown[count] = peak_growth(lambda path=path: sum(1 for _ in open_video(path).frames()))
    assert grown[400] < grown[40] + 100 * frame.nbytes  # of 360 more


def test_metadata_need_not_be_utf8(tmp_path):
    path, frames = tmp_path / "a.mp4", numbered(3, 64, 48)
    data = write(path, frames).read_bytes()
    assert data.count(b"Lavf") == 1  # the name of the program that wrote it
    path.write_bytes(data.replace(b"Lavf", b"\xff\xfeaf"))
    assert len(list(open_video(path).frames())) == 3


@pytest.mark.skipif(not REAL, reason="needs the real clips")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_clips_agree_with_their_packets(path):
    video = open_video(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pts = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        size = (stream.codec_context.height, stream.codec_context.width)
    assert len(video) == len(pts) and (video.height, video.width) == size
    np.testing.assert_allclose(video.times, (np.array(pts) - pts[0]) * float(stream.time_base), atol=1e-9)
    assert [frame.shape for _, frame in video.read([0, 5])] == [(*size, 3)] * 2


# --- rotation


@pytest.mark.parametrize(
    ("matrix", "show"),
    [
        ((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), lambda x: x),
        ((0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30), lambda x: np.rot90(x, -1)),  # a phone held upright, by Apple's manual
        ((0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), lambda x: np.rot90(x)),
        ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30), lambda x: np.rot90(x, 2)),
        ((-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), np.fliplr),  # a front camera
        ((0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), lambda x: np.swapaxes(x, 0, 1)),
    ],
)
def test_rotation(tmp_path, matrix, show):
    frames = numbered(5) + np.arange(128, dtype=np.uint8)[:, None] // 4
    plain = open_video(write(tmp_path / "plain.mp4", frames))
    turned = open_video(write(tmp_path / "turned.mp4", frames, matrix=matrix))
    wanted = [show(frame) for frame in plain.frames()]
    assert (turned.height, turned.width) == wanted[0].shape[:2]
    for frame, want in zip(turned.frames(), wanted, strict=True):
        np.testing.assert_array_equal(frame, want)
    # and by FFmpeg's own reading of the matrix (which does not tell mirror images)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        degrees = next(container.decode(video=0)).rotation
    if np.linalg.det(np.reshape(matrix, (3, 3)) / ONE) > 0:
        np.testing.assert_array_equal(np.rot90(next(plain.frames()), degrees // 90), wanted[0])


# --- folders


def test_a_folder_in_natural_order(tmp_path):
    for t, name in enumerate(["1.png", "2.jpg", "10.JPG", "frame3.jpeg", "frame20.png"]):
        Image.fromarray(numbered(5)[t]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._1.png").write_bytes(b"what macOS leaves on foreign disks")
    video = open_video(tmp_path)
    assert [number(frame) for frame in video.frames()] == list(range(5))
    assert (video.height, video.width) == (64, 128) and video.times[1] == pytest.approx(1 / 24)
    assert [(i, number(frame)) for i, frame in video.read([4, 2])] == [(2, 2), (4, 4)]
    assert open_video(str(tmp_path / "1.png")).height == 64  # a single image is a video of one frame


def test_names_of_the_same_number_have_an_order():
    wanted = ["a", "a01", "a1", "a001b", "a1b", "a2", "b"]
    assert sorted(wanted, key=natural) == sorted(reversed(wanted), key=natural) == wanted


def test_kinds_of_images(tmp_path):
    frame = numbered(6)[5]
    for index, mode in enumerate(["L", "P", "RGBA", "1", "CMYK"]):
        Image.fromarray(frame).convert(mode).save(tmp_path / f"{index}.{'jpg' if mode == 'CMYK' else 'png'}")
    upright = Image.fromarray(frame)
    exif = upright.getexif()
    exif[0x0112] = 5  # the camera was turned and shows a mirror image: swap rows and columns
    upright.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "5.jpg", exif=exif, quality=100)
    Image.fromarray(frame[..., 0].astype(np.uint16) << 8).save(tmp_path / "6.png")
    shown = list(open_video(tmp_path).frames())
    assert len(shown) == 7 and all(frame.shape == (64, 128, 3) for frame in shown)
    assert [number(frame) for frame in shown] == [5] * 7
    np.testing.assert_array_equal(shown[6], shown[0])  # 16 bits as 8, not clipped
    np.testing.assert_array_equal(next(open_video(tmp_path / "5.jpg").frames()), shown[5])  # by itself as in the folder


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_side_data_without_a_name(tmp_path, orientation):
    """FFmpeg hands out EXIF data as a kind of side data that PyAV's list does not know."""
    image = Image.fromarray(numbered(1)[0] + np.arange(128, dtype=np.uint8)[:, None] // 4)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.webp", exif=exif, lossless=True)
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / "a.webp"))
    shown = next(open_video(tmp_path / "a.webp").frames())
    assert shown.shape[:2] == wanted.size[::-1] and np.abs(shown - np.asarray(wanted, float)).max() < 8


def test_bad_folders(tmp_path):
    assert "holds no JPEG or PNG images" in refused(tmp_path)
    for t, frame in enumerate(numbered(3)):
        Image.fromarray(frame).save(tmp_path / f"{t}.png")
    (tmp_path / "1.png").write_bytes(b"not an image")
    assert "1.png cannot be read" in refused(tmp_path)
    Image.fromarray(numbered(1)[0]).save(tmp_path / "1.jpg")
    (tmp_path / "1.png").unlink()
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    assert "1.jpg cannot be read" in refused(tmp_path)
    Image.fromarray(numbered(1)[0, :-1]).save(tmp_path / "1.jpg")
    assert "frame 1 (1.jpg) is 128 x 63 pixels, those before it 128 x 64" in refused(tmp_path)


def test_files_that_change(tmp_path):
    for t, frame in enumerate(numbered(3)):
        Image.fromarray(frame).save(tmp_path / f"{t}.png")
    video = open_video(tmp_path)
    Image.fromarray(numbered(3)[2, :50]).save(tmp_path / "2.png")
    with pytest.raises(RunFailure, match="changed while it was being read: frame 2"):
        list(video.frames())


# --- what is no video


def test_bad_files(tmp_path):
    assert "No such file" in refused(tmp_path / "missing.mp4")
    assert "name too long" in refused(Path("x" * 5000))
    for name, content in {
        "text.mp4": b"Dear all,\nplease find the video attached.\n" * 20,
        "empty.mp4": b"",
        "noise.mkv": random.Random(0).randbytes(5000),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read: Invalid data" in refused(tmp_path / name)
    assert "no video stream" in refused(write_sound(tmp_path / "sound.mp4"))
    assert "no video stream" in refused(write_sound(tmp_path / "song.mp4", cover=numbered(1)[0]))
    (tmp_path / "subtitles.mp4").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n\n" * 3)
    assert "no video stream" in refused(tmp_path / "subtitles.mp4")


def test_zero_frames(tmp_path):
    path = write(tmp_path / "none.mkv", numbered(1), "ffv1")
    data = path.read_bytes()
    cluster = data.index(b"\x1f\x43\xb6\x75")
    segment = data.index(b"\x18\x53\x80\x67")
    end = cluster - segment - 12  # the segment's length, so that the file ends before its frames, and rightly so
    path.write_bytes(data[: segment + 4] + (end | 1 << 56).to_bytes(8, "big") + data[segment + 12 : cluster])
    assert "holds no frames" in refused(path)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"container": {"movflags": "faststart"}}),
        ("fragments.mp4", "libx264", {"container": {"movflags": "frag_keyframe+empty_moov"}, "g": "7"}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8"}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_truncated_files_say_how_much_is_there(tmp_path, name, codec, options):
    noise = np.random.default_rng(0).integers(0, 90, (60, 64, 128, 3), dtype=np.uint8)
    path = write(tmp_path / name, numbered(60) + noise // 2, codec, **options)
    data = path.read_bytes()
    assert declared_size(path) == len(data)
    readable = []
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        said = refused(path)
        missing = int(said.split("is truncated (at least ")[1].split()[0])
        assert missing == len(data) - int(len(data) * share) or (name == "fragments.mp4" and missing > 0)
        readable.append(0 if "no frame" in said else int(said.split("only ")[1].split()[0]))
    assert readable == sorted(readable) and 60 * 0.5 < readable[-1] < 60
    path.write_bytes(data[:-1])
    assert "is truncated" in refused(path)
    for garbage in (b"\n", b"garbage behind the end" * 9, bytes(100)):
        path.write_bytes(data + garbage)
        assert len(open_video(path)) == 60


def test_an_mp4_that_lost_its_index(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(60))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 20])
    assert "is truncated" in refused(path) and "no frame can be read" in refused(path)


def test_damage_in_the_middle_never_raises_anything_else(tmp_path):
    chance = random.Random(0)
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video")):
        path = write(tmp_path / name, numbered(8), codec)
        data = path.read_bytes()
        for _ in range(40):
            broken = bytearray(data)
            for _ in range(chance.choice([1, 8, 64])):
                broken[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(broken)
            try:
                video = open_video(path)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                assert len(video) >= 1 and (np.diff(video.pts) > 0).all() and video.duration > 0


def test_a_file_nobody_may_read(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(2))
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may
        assert "Permission denied" in refused(path)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\0\0\0\x18ftyp", b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\x01moov", b"\0\0\0\0mdat", b""]),
    st.binary(max_size=60),
)
def test_declared_size_of_anything(tmp_path_factory, head, tail):
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(head + tail)
    size = declared_size(path)
    assert size is None or size >= 0


# --- overlays


@pytest.mark.parametrize("size", [(64, 128), (47, 63), (1, 1)])
def test_overlay_video_keeps_number_and_times(tmp_path, size):
    pts, last, time_base = np.array([0, 33, 34, 500, 541]), 77, Fraction(1, 1000)
    frames = numbered(5, *size)
    write_video(tmp_path / "o.mp4", iter(frames), pts, last, time_base)
    video = open_video(tmp_path / "o.mp4")
    np.testing.assert_allclose(video.times, pts / 1000, atol=1e-9)
    assert float(video.duration) == pytest.approx(0.618)
    assert (video.height, video.width) == tuple(side + side % 2 for side in size)
    if size != (1, 1):
        assert [number(frame[: size[0], : size[1]]) for frame in video.frames()] == list(range(5))
    with av.open(str(tmp_path / "o.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_drawing():
    frame = np.full((40, 60, 3), 100, np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    drawn = draw(frame, mask, (5.2, 4.8, 12, 9))
    assert frame.min() == 100 == frame.max()
    assert (drawn[11:29, 21:49] == drawn[20, 30]).all() and (drawn[20, 30] != 100).any()  # tinted
    assert (drawn[10, 20:50] == 255).all() and (drawn[10:30, 49] == 255).all()  # outlined
    outside = ~mask
    outside[5:9, 5:12] = False
    assert (drawn[outside] == 100).all()
    assert (drawn[5, 5:12] == drawn[5, 5]).all() and (drawn[5, 5] != 100).any() and (drawn[6:8, 6:11] == 100).all()
    np.testing.assert_array_equal(draw(frame, np.zeros_like(mask)), frame)
    draw(frame, ~np.zeros_like(mask), (-5, -5, 1000, 1000))
    draw(frame[:1, :1], mask[10:11, 20:21], (0, 0, 1, 1))
