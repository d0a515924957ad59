"""Small real videos whose frames carry their number, for the tests to read back."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def numbered(count: int, height: int = 64, width: int = 128) -> np.ndarray:
    """uint8 [count, height, width, 3]: frame t shows the 8 bits of t as 2 x 4 bright or dark blocks."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    levels = np.where(bits, 220, 30).reshape(count, 2, 4).astype(np.uint8)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 4 // width
    return np.repeat(levels[:, rows][:, :, columns, None], 3, axis=-1)


def number(frame: np.ndarray) -> int:
    """What `numbered` wrote into a frame, however well it survived."""
    height, width = frame.shape[:2]
    rows, columns = (np.arange(2) * 2 + 1) * height // 4, (np.arange(4) * 2 + 1) * width // 8
    bits = frame[rows][:, columns].mean(-1).ravel() > 125
    return int((bits << np.arange(8)).sum())


def write(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pts: list[int] | None = None,
    time_base: Fraction = Fraction(1, 30),
    pixels: str = "yuv420p",
    matrix: tuple[int, ...] | None = None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Encodes frames at 30 a second, or as `pts` in units of `time_base` say. `matrix` is FFmpeg's display matrix."""
    suffixes = {".h264": "h264", ".mjpeg": "mjpeg"}
    with av.open(str(path), "w", format=suffixes.get(path.suffix), options=container or {}) as file:
        stream = file.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.time_base = time_base
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index if pts is None else pts[index], time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_sound(path: Path, cover: np.ndarray | None = None) -> Path:
    """A file with sound alone, or with a picture of its cover, which FFmpeg counts among the video streams."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        stream.layout = "mono"
        if cover is not None:
            picture = file.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24")
            frame.pts = 0
            file.mux([*picture.encode(frame), *picture.encode(None)])
        for index in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 44100, index * 1024
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's memory rose at most while `work` ran: libraries' own memory counts too."""

    def status(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before
