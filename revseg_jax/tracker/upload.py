"""A clip as it goes to a sidecar: header, frames, truth. No torch here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from revseg_jax.errors import InputError
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.wire import MESSAGE_BYTES, PIECE_BYTES, ClipHash, encode_masks, truth_hash

ClipFrames = np.ndarray | Sequence[bytes]  # uint8 [T, H, W, 3], or T JPEG images
Truth = np.ndarray | Sequence[dict | None]  # bool [T, H, W], or T COCO compressed RLEs (None: absent)


@dataclass(frozen=True)
class Upload:
    """What PutClip needs. `frames` starts anew at each call. A streamed clip has no id and no count beforehand."""

    header: pb.ClipHeader
    frames: Callable[[], Iterable[bytes]]
    count: int
    size: int  # bytes of all frames together
    truth: tuple[bytes, ...] = ()
    failures: list[Exception] = field(default_factory=list)  # of reading the frames; gRPC would swallow them

    def messages(self, with_frames: bool = True, with_truth: bool = True) -> Iterator[pb.PutClipRequest]:
        """When the frames cannot be read, keeps the error in `failures` and sends what makes the sidecar refuse."""
        yield pb.PutClipRequest(header=self.header)
        if with_frames:
            try:
                for frame in self.frames():
                    for start in range(0, len(frame), PIECE_BYTES):
                        piece, last = frame[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(frame)
                        yield pb.PutClipRequest(piece=pb.FramePiece(data=piece, last=last))
            except Exception as error:
                self.failures.append(error)
                yield pb.PutClipRequest()
                return
        if with_truth:
            for part in _parts(self.truth):
                yield pb.PutClipRequest(truth=pb.Truth(counts=part))


def clip_upload(clip: ClipFrames, image_size: int, truth: Truth | None = None) -> Upload:
    """Raises InputError for anything that is not a clip, or a truth of other frames than the clip's."""
    if isinstance(clip, np.ndarray):
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
            raise InputError(f"a clip must be uint8 [T, H, W, 3] or JPEG images, not {clip.dtype} {list(clip.shape)}")
        header, frames = _rgb_header(clip[0], image_size), [_rgb_bytes(frame, image_size) for frame in clip]
    else:
        frames = list(clip)
        header = _jpeg_header(frames)
    clip_hash = ClipHash(header.height, header.width, header.encoding, header.frame_height, header.frame_width)
    for frame in frames:
        clip_hash.add(frame)
    header.clip_id = clip_hash.name()
    counts = () if truth is None else _truth_counts(truth, len(frames), header.height, header.width)
    if counts:
        header.truth_id = truth_hash(counts)
    return Upload(header, lambda: frames, len(frames), sum(map(len, frames)), counts)


def stream_upload(open_frames: Callable[[], Iterable[np.ndarray]], image_size: int) -> Upload:
    """The upload of a clip that is read while it is sent. Raises InputError when it has no frame."""
    first = next(iter(open_frames()), None)
    if first is None:
        raise InputError("the clip has no frames")
    frames = lambda: (_rgb_bytes(frame, image_size, first.shape) for frame in open_frames())  # noqa: E731
    return Upload(_rgb_header(first, image_size), frames, count=0, size=0)


def sent_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which an RGB frame is sent: those of the model's frames where these are smaller."""
    return (image_size, image_size) if height * width > image_size**2 else (height, width)


def _rgb_header(frame: np.ndarray, image_size: int) -> pb.ClipHeader:
    height, width = frame.shape[:2]
    sent = sent_size(height, width, image_size)
    return pb.ClipHeader(height=height, width=width, encoding=pb.RGB, frame_height=sent[0], frame_width=sent[1])


def _rgb_bytes(frame: np.ndarray, image_size: int, shape: tuple[int, ...] | None = None) -> bytes:
    if shape is not None and frame.shape != shape:
        raise InputError(f"the frames of a clip must have one size, not {list(shape)} and {list(frame.shape)}")
    if sent_size(*frame.shape[:2], image_size) != frame.shape[:2]:
        # The first thing the sidecar would do with it, with the same result.
        frame = np.asarray(Image.fromarray(frame).resize((image_size, image_size)))
    return frame.tobytes()


def _jpeg_header(frames: list[bytes]) -> pb.ClipHeader:
    if not frames or not all(isinstance(frame, bytes) and frame for frame in frames):
        raise InputError("a clip must be uint8 [T, H, W, 3] or a list of JPEG images as bytes, at least one")
    try:
        width, height = Image.open(io.BytesIO(frames[0]), formats=["JPEG"]).size  # reads the header only
    except (OSError, SyntaxError):
        raise InputError("frame 0 of the clip is not a JPEG image") from None
    return pb.ClipHeader(height=height, width=width, encoding=pb.JPEG)


def _truth_counts(truth: Truth, count: int, height: int, width: int) -> tuple[bytes, ...]:
    if isinstance(truth, np.ndarray):
        if truth.dtype != bool or truth.shape != (count, height, width):
            raise InputError(f"truth must be bool {[count, height, width]}, not {truth.dtype} {list(truth.shape)}")
        return tuple(encode_masks(truth))
    if len(truth) != count:
        raise InputError(f"truth has {len(truth)} masks for a clip of {count} frames")
    counts = []
    for index, mask in enumerate(truth):
        if mask is not None and list(mask["size"]) != [height, width]:
            raise InputError(f"truth mask {index} is {list(mask['size'])} in a clip of {[height, width]}")
        run_lengths = b"" if mask is None else mask["counts"]
        counts.append(run_lengths.encode() if isinstance(run_lengths, str) else run_lengths)
    return tuple(counts)


def _parts(counts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Splits the truth into messages well below the limit."""
    part, size = [], 0
    for run_lengths in counts:
        if part and size + len(run_lengths) > MESSAGE_BYTES // 4:
            yield part
            part, size = [], 0
        part.append(run_lengths)
        size += len(run_lengths)
    if part:
        yield part
