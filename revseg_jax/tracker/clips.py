"""The clips a sidecar holds: encoded frames and truths, named by their content, least recently used out first."""

from __future__ import annotations

import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from revseg_jax.errors import InputError
from revseg_jax.tracker.tracker_pb2 import JPEG, RGB
from revseg_jax.tracker.wire import ClipHash, check_counts, truth_hash

SPOOL_BYTES = 1 << 20  # a clip larger than this lies in an unnamed temporary file
MOST_SCANS = 100  # of a JPEG image; each costs a pass over all pixels, and a progressive one has about ten
_SCAN = b"\xff\xda"  # the marker that starts one; compressed data never holds it


@dataclass(frozen=True)
class Limits:
    """What a sidecar accepts and keeps. Memory for frames is at most max_clips * SPOOL_BYTES; the rest is on disk."""

    max_frames: int = 20_000  # of a clip
    max_pixels: int = 40_000_000  # of a frame (8K is 33 million)
    max_prompts: int = 1024  # of a call
    max_masks: int = 2_000_000  # of a call: prompts times frames
    max_calls: int = 64  # under way or waiting; the next one is told to come back later
    max_calls_together: int = 16  # of these on one connection, so that others find room
    max_clips: int = 512
    max_truths: int = 256  # of a clip
    clip_bytes: int = 8 << 30  # of all clips together
    truth_bytes: int = 64 << 20  # of one truth
    all_truth_bytes: int = 1 << 30  # of all truths together, in memory


class Full(Exception):
    """As many calls, or as much of their clips, as this sidecar takes is under way."""


class ClipNotHeld(LookupError):
    """The clip or the truth was never put here or has been evicted."""


@dataclass
class Clip:
    """One clip of `frames` frames; boxes and masks are in pixels of height x width."""

    clip_id: str
    height: int
    width: int
    encoding: int
    frame_height: int
    frame_width: int
    offsets: list[int]  # of each frame in `content`, and the end
    content: tempfile.SpooledTemporaryFile
    truths: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    truth_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def frames(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        return self.offsets[-1]

    def frame(self, index: int, size: int) -> np.ndarray:
        """Frame `index` as uint8 [size, size, 3], resized as sam2's loader of JPEG folders does."""
        with self.lock:
            self.content.seek(self.offsets[index])
            data = self.content.read(self.offsets[index + 1] - self.offsets[index])
        try:
            if self.encoding == JPEG:
                image = Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB")
            else:
                image = Image.frombytes("RGB", (self.frame_width, self.frame_height), data)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken files
            raise InputError(f"frame {index} cannot be decoded: {error}") from None
        return np.asarray(image.resize((size, size)))

    def truth(self, truth_id: str) -> tuple[bytes, ...]:
        """COCO compressed RLE, one a frame; empty where the object is absent. Raises ClipNotHeld."""
        with self.lock:
            counts = self.truths.get(truth_id)
        if counts is None:
            raise ClipNotHeld(f"truth {truth_id} of clip {self.clip_id} is not held")
        return counts

    def add_truth(self, truth_id: str, counts: Sequence[bytes], limits: Limits) -> None:
        """Keeps a truth, one mask of the clip's size for each frame or InputError; the oldest ones beyond limits go."""
        if len(counts) != self.frames:
            raise InputError(f"truth: {len(counts)} masks for a clip of {self.frames} frames")
        if truth_hash(counts) != truth_id:
            raise InputError("truth_id: not the hash of the masks that came")
        for index, run_lengths in enumerate(counts):
            try:
                check_counts(run_lengths, self.height, self.width)
            except InputError as error:
                raise InputError(f"truth: mask {index}: {error}") from None
        with self.lock:
            self.truth_bytes += sum(map(len, counts)) if truth_id not in self.truths else 0
            self.truths[truth_id] = tuple(counts)
            while len(self.truths) > limits.max_truths or self.truth_bytes > limits.all_truth_bytes:
                self.truth_bytes -= sum(map(len, self.truths.pop(next(iter(self.truths)))))


class ClipWriter:
    """Collects the frames of a clip that is being put, piece by piece, and checks them as they come."""

    def __init__(
        self,
        height: int,
        width: int,
        encoding: int,
        frame_height: int,
        frame_width: int,
        limits: Limits,
        take: Callable[[int], None] = lambda size: None,
    ):
        """take: is told of bytes before they are written (`ClipStore.room`)."""
        if encoding not in (JPEG, RGB):
            raise InputError(f"encoding: {encoding} is neither JPEG nor RGB")
        if encoding == JPEG and (frame_height or frame_width):
            raise InputError("frame_height, frame_width: only for RGB frames")
        for name, h, w in (("height, width", height, width), ("frame_height, frame_width", frame_height, frame_width)):
            if name == "height, width" or encoding == RGB:
                if h < 1 or w < 1 or h * w > limits.max_pixels:
                    raise InputError(f"{name}: {h} x {w} is not between 1 and {limits.max_pixels} pixels")
        self.sizes = (height, width, encoding, frame_height, frame_width)
        self.limits, self.take = limits, take
        self.hash = ClipHash(*self.sizes)
        self.offsets = [0]
        self.content = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        self.pieces = bytearray()  # of the frame that is coming

    @property
    def empty(self) -> bool:
        return not self.pieces and len(self.offsets) == 1

    def add(self, piece: bytes, last: bool) -> None:
        height, width, encoding, frame_height, frame_width = self.sizes
        largest = frame_height * frame_width * 3 if encoding == RGB else height * width * 3 + (1 << 20)
        index = len(self.offsets) - 1
        if not piece:
            raise InputError(f"frame {index}: an empty piece")
        self.pieces += piece
        if len(self.pieces) > largest:
            raise InputError(f"frame {index}: longer than {largest} bytes")
        if not last:
            return
        frame, self.pieces = bytes(self.pieces), bytearray()
        self._check(frame)
        if self.offsets[-1] + len(frame) > self.limits.clip_bytes:
            raise InputError(f"clip: more than {self.limits.clip_bytes} bytes")
        self.take(len(frame))
        self.hash.add(frame)
        self.content.write(frame)
        self.offsets.append(self.offsets[-1] + len(frame))

    def close(self, clip_id: str) -> Clip:
        """The clip, if its frames have the hash `clip_id` (when given)."""
        if self.pieces:
            raise InputError(f"frame {len(self.offsets) - 1}: its last piece is missing")
        if clip_id and clip_id != self.hash.name():
            raise InputError("clip_id: not the hash of the frames that came")
        return Clip(self.hash.name(), *self.sizes, offsets=self.offsets, content=self.content)

    def _check(self, frame: bytes) -> None:
        index, (height, width, encoding, frame_height, frame_width) = len(self.offsets) - 1, self.sizes
        if index >= self.limits.max_frames:
            raise InputError(f"clip: more than {self.limits.max_frames} frames")
        if encoding == RGB:
            if len(frame) != frame_height * frame_width * 3:
                raise InputError(f"frame {index}: {len(frame)} bytes are not {frame_height} x {frame_width} x 3")
            return
        try:  # reads the header only
            size = Image.open(io.BytesIO(frame), formats=["JPEG"]).size
        except (OSError, SyntaxError, Image.DecompressionBombError):
            raise InputError(f"frame {index}: not a JPEG image") from None
        if frame.count(_SCAN) > MOST_SCANS:
            raise InputError(f"frame {index}: a JPEG image of more than {MOST_SCANS} scans")
        if size != (width, height):
            raise InputError(f"frame {index}: {size[1]} x {size[0]} pixels in a clip of {height} x {width}")


class ClipStore:
    """Clips by id, bounded in number and in bytes, those that are being put included."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._clips: OrderedDict[str, Clip] = OrderedDict()
        self._coming = 0  # bytes of clips that are being put
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, clip_id: str) -> Clip:
        """Raises ClipNotHeld."""
        with self._lock:
            if clip_id not in self._clips:
                raise ClipNotHeld(f"clip {clip_id} is not held")
            self._clips.move_to_end(clip_id)
            return self._clips[clip_id]

    @contextmanager
    def room(self) -> Iterator[tuple[Callable[[int], None], Callable[[Clip], Clip]]]:
        """For a clip that is being put: (take, put).

        take: is given bytes of it as they come, for which held clips go. It raises Full when those of all such clips
        together would be more than the limit. put: keeps the clip (or the equal one held already), evicts others until
        the limits hold and returns it.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            with self._lock:
                if self._coming + size > self.limits.clip_bytes:
                    raise Full
                self._coming, taken = self._coming + size, taken + size
                self._evict()

        def put(clip: Clip) -> Clip:
            nonlocal taken
            with self._lock:  # in one go from coming to held: in between its room would be another's, and it evicted
                self._coming, taken = self._coming - taken, 0
                clip = self._clips.setdefault(clip.clip_id, clip)
                self._clips.move_to_end(clip.clip_id)
                self._evict()
                return clip

        try:
            yield take, put
        finally:
            with self._lock:
                self._coming -= taken

    def add_truth(self, clip: Clip, truth_id: str, counts: Sequence[bytes]) -> None:
        """`Clip.add_truth`, then evicts other clips until the limits hold."""
        clip.add_truth(truth_id, counts, self.limits)
        with self._lock:
            self._evict()

    def _evict(self) -> None:
        while self._over():  # never of one clip alone, whose bytes and truths are bounded by themselves
            self._clips.popitem(last=False)  # its file goes when the last call that uses it ends

    def _over(self) -> bool:
        held, limits = self._clips.values(), self.limits
        return (
            len(held) > limits.max_clips
            or sum(clip.bytes for clip in held) + self._coming > limits.clip_bytes
            or sum(clip.truth_bytes for clip in held) > limits.all_truth_bytes
        )
