"""Masks drawn over their video, as an H.264 file that plays everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TINT = np.array([255, 60, 60], np.uint8)
OUTLINE, BOX = (255, 255, 255), (255, 220, 0)
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers; stated in the file, so that every player shows the same colours


def draw(frame: np.ndarray, mask: np.ndarray, box: Sequence[float] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]: the frame with its mask, bool [H, W], tinted and outlined, and with a box x1, y1, x2, y2."""
    drawn = np.where(mask[..., None], frame // 2 + TINT // 2, frame)
    line = max(1, round(max(mask.shape) / 500))
    within, inside = slice(line, -line), np.zeros_like(mask)  # inside: the mask goes on for `line` pixels all around
    inside[within, within] = mask[: -2 * line, within] & mask[2 * line :, within]
    inside[within, within] &= mask[within, : -2 * line] & mask[within, 2 * line :]
    drawn[mask & ~inside] = OUTLINE
    if box is not None:
        x1, y1, x2, y2 = (max(0, round(value)) for value in box)
        outline = np.zeros_like(mask)
        outline[y1:y2, x1:x2] = True
        outline[y1 + line : max(y1 + line, y2 - line), x1 + line : max(x1 + line, x2 - line)] = False
        drawn[outline] = BOX
    return drawn


def write_video(path: Path, frames: Iterable[np.ndarray], pts: np.ndarray, last: int, time_base: Fraction) -> None:
    """Encodes T uint8 [H, W, 3] frames as an mp4. An odd side is made even by repeating its last row or column.

    pts: int64 [T], when each frame is shown; last: how long the last one is; both in units of time_base seconds.
    Raises OSError or av.error.FFmpegError when the file cannot be written.
    """
    codec, options = "libx264", {"preset": "veryfast", "crf": "20", "tune": "zerolatency"}  # holds no frames back
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qscale": "3"}
    durations = [*np.diff(pts).tolist(), last]
    rate = (len(durations) / (sum(durations) * time_base)).limit_denominator(1001)
    stream = None
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        for index, pixels in enumerate(frames):
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), "edge")
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                context = stream.codec_context
                context.time_base = time_base
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = LIMITED_RANGE
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = int(pts[index]), time_base
            for packet in stream.encode(frame):
                packet.duration = durations[index]
                container.mux(packet)
        container.mux(stream.encode(None))
