"""A user's video, a file or a folder of images: upright frames in presentation order, never all of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from revseg_jax.data.container import declared_size
from revseg_jax.data.frames import upright
from revseg_jax.data.natural_order import natural
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.paths import local_only

IMAGES = (".jpg", ".jpeg", ".png")
Orientation = tuple[bool, bool, bool]
FOLDER_FPS = 24  # a folder of frames has no times; DAVIS's are 24 a second


@dataclass(frozen=True)
class Video:
    """T frames of one size. Only their times are held; each reading decodes anew.

    Attributes:
      path: a file, or a folder of images
      height, width: pixels of the frames as they are shown, after the rotation that the file asks for. Frames whose
        pixels are not square (pixel aspect ratio other than 1) are not stretched: masks are for the stored pixels
      pts: int64 [T], when each frame is shown, strictly increasing from 0, in units of time_base
      last: how long the last frame is shown, in the same units
      time_base: seconds
      images: the files of a folder, in order, or the one JPEG or PNG that was given; empty for a video file
      orientation: (swap rows and columns, then flip rows, flip columns) that show a decoded frame upright
    """

    path: Path
    height: int
    width: int
    pts: np.ndarray
    last: int
    time_base: Fraction
    images: tuple[Path, ...] = ()
    orientation: Orientation = (False, False, False)

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def times(self) -> np.ndarray:
        """float64 [T], seconds from the first frame."""
        return self.pts * float(self.time_base)

    @property
    def duration(self) -> Fraction:
        """Seconds, those of the last frame included."""
        return (int(self.pts[-1]) + self.last) * self.time_base

    @property
    def fps(self) -> Fraction:
        """Frames per second on average."""
        return len(self) / self.duration

    def frames(self) -> Iterator[np.ndarray]:
        """All frames, uint8 [height, width, 3] RGB. RunFailure when they are not those there were at opening."""
        return (pixels for _, pixels in self.read(range(len(self))))

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, frame as in `frames`) of the chosen ones, in increasing order, in one pass up to the last."""
        wanted = frozenset(indices)
        with closing(_images(self.images) if self.images else _decode(self.path)) as source:
            for index in range(max(wanted, default=-1) + 1):
                frame = next(source, None)
                if frame is None or _size(frame, self.orientation) != (self.height, self.width):
                    raise RunFailure(f"{self.path} changed while it was being read: frame {index} is not what it was")
                if index in wanted:
                    yield index, _pixels(frame, self.orientation)


def open_video(path: str | Path, progress: bool = False) -> Video:
    """Decodes every frame once: that alone tells for certain how many there are, and that all can be read.

    Raises InputError in one line: nothing there, not a video, no video stream, no frames, a file that is truncated or
    damaged (with the number of frames that can be read), an image that cannot be read, frames of several sizes.
    """
    path = local_only(path)
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"video {path} cannot be opened: {getattr(error, 'strerror', error)}") from None
    images = _list_images(path) if path.is_dir() else (path,) if path.suffix.lower() in IMAGES else ()
    pts, durations, size, time_base = [], [], None, Fraction(1, FOLDER_FPS)
    orientation = (False, False, False)
    with closing(_images(images) if images else _decode(path)) as source:
        for frame in tqdm(source, "reading the video", unit=" frames", leave=False, disable=not progress or None):
            if size is None:
                if not images:
                    # Of the first frame only: PyAV's side data makes a cycle with its frame, which then stays until
                    # the garbage collector runs.
                    orientation, time_base = _orientation(frame), frame.time_base
                size = _size(frame, orientation)
            height, width = _size(frame, orientation)
            if (height, width) != size:
                name = f" ({images[len(pts)].name})" if images else ""
                raise InputError(
                    f"video {path}: frame {len(pts)}{name} is {width} x {height} pixels, "
                    f"those before it {size[1]} x {size[0]}"
                )
            pts.append(len(pts) if images else frame.pts)
            durations.append(1 if images else frame.duration)
    if not images and (not pts or _cut_off(path)):
        raise InputError(_complaint(path, len(pts), "no frame in it can be decoded"))
    timeline, last = _timeline(pts, durations, time_base)
    return Video(path, *size, timeline, last, time_base, images, orientation)


def _timeline(pts: list[int | None], durations: list[int], time_base: Fraction) -> tuple[np.ndarray, int]:
    """Strictly increasing times from 0, and how long the last frame lasts, from what the container tells."""
    usual = int(np.median(durations)) or max(1, round(1 / (FOLDER_FPS * time_base)))
    if None in pts:  # a raw stream
        return np.arange(len(pts)) * usual, usual
    # Frames come in presentation order; where their times do not (AVI numbers them as they were coded), the set of
    # times still holds.
    times = np.sort(np.array(pts, np.int64))
    ticks = np.arange(len(times))
    times = np.maximum.accumulate(times - ticks) + ticks  # equal times move apart by a tick
    if not durations[-1] and len(times) > 1:
        usual = max(1, round(int(times[-1] - times[0]) / (len(times) - 1)))
    return times - times[0], durations[-1] or usual


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    """Frames of the best video stream in presentation order. Raises InputError."""
    count = 0
    try:
        # "file:" and an absolute path, or a name with a colon in it would be taken for an address.
        options = {"options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
        with av.open(f"file:{path.absolute()}", **options) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # a song's cover
                raise InputError(f"video {path} has no video stream")
            if stream.codec_context is None:
                raise InputError(f"video {path} has a codec that cannot be decoded here")
            stream.thread_type = "AUTO"
            try:
                for packet in container.demux(stream):
                    try:
                        frames = packet.decode()
                    except av.error.FFmpegError:
                        if count:
                            raise
                        frames = []  # a stream cut out of a longer one begins with what needs frames before it
                    for frame in frames:
                        count += 1
                        yield frame
            except IndexError:
                pass  # PyAV stumbles over streams that appear on the way, once ours has ended
            except av.error.FFmpegError:
                with suppress(av.error.FFmpegError):
                    for frame in stream.decode():  # those read before the error
                        count += 1
                        yield frame
                raise
    except av.error.FFmpegError as error:
        reason = "it holds no frames" if isinstance(error, av.error.EOFError) else error.strerror
        raise InputError(_complaint(path, count, reason)) from None


def _complaint(path: Path, count: int, reason: str) -> str:
    readable = f"only {count} frames can be read" if count else "no frame can be read"
    if _cut_off(path):
        missing = f"at least {declared_size(path) - path.stat().st_size} bytes are missing"
        return f"video {path} is truncated ({missing}, {readable}): give the whole file"
    return f"video {path} is damaged, {readable}: {reason}" if count else f"video {path} cannot be read: {reason}"


def _cut_off(path: Path) -> bool:
    return (declared_size(path) or 0) > path.stat().st_size


def _list_images(folder: Path) -> tuple[Path, ...]:
    """In the order a person would number them: 2.png before 10.png."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
    if not files:
        raise InputError(f"video folder {folder} holds no JPEG or PNG images")
    return tuple(sorted(files, key=lambda path: natural(path.name)))


def _images(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """Upright RGB images. Raises InputError."""
    for path in paths:
        try:
            with Image.open(path, formats=["JPEG", "PNG"]) as image:
                yield _rgb(upright(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"image {path} cannot be read: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """With 8 bits a channel. Of 16-bit colour Pillow itself reads the high bytes; 16-bit grey it would clip at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _size(frame: Image.Image | av.VideoFrame, orientation: Orientation) -> tuple[int, int]:
    """Height and width of a frame as it is shown."""
    return (frame.width, frame.height) if orientation[0] else (frame.height, frame.width)


def _pixels(frame: Image.Image | av.VideoFrame, orientation: Orientation) -> np.ndarray:
    """uint8 [height, width, 3] of a frame as it is shown."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame)
    swap, flip_rows, flip_columns = orientation
    pixels = frame.to_ndarray(format="rgb24")
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _orientation(frame: av.VideoFrame) -> Orientation:
    """What shows a frame as its display matrix wants.

    FFmpeg's matrix takes (x, y) to (a x + c y, b x + d y) and starts a, b, u, c, d; phones use quarter turns and mirror
    images only, so other angles count as the nearest of these.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists no side data when there are any of a kind it has no name for, such as EXIF
        quarters = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))
        return quarters[round(frame.rotation / 90) % 4]
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)
