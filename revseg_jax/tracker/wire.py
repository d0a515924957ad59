"""What client and sidecar must agree on: names of clips by content, masks as RLE, sizes of messages. No torch here."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from pycocotools import mask as coco_mask

from revseg_jax.data.run_lengths import run_lengths
from revseg_jax.errors import InputError

PIECE_BYTES = 1 << 20  # frames travel in pieces of at most this size
MESSAGE_BYTES = 4 << 20  # the largest request a sidecar takes
REPLY_BYTES = 64 << 20  # the largest reply a client takes
RETRY_KEY = "grpc-retry-pushback-ms"  # trailing metadata of a full sidecar's answer: when to ask again


class ClipHash:
    """Names a clip by its content, frame by frame: SHA-256 over the header's sizes and every frame with its length."""

    def __init__(self, height: int, width: int, encoding: int, frame_height: int, frame_width: int):
        self._hash = hashlib.sha256(struct.pack("<5Q", height, width, encoding, frame_height, frame_width))

    def add(self, frame: bytes) -> None:
        self._hash.update(struct.pack("<Q", len(frame)))
        self._hash.update(frame)

    def name(self) -> str:
        return self._hash.hexdigest()


def truth_hash(counts: Sequence[bytes]) -> str:
    """Names the truth of a clip: SHA-256 over the RLE counts of every frame with their lengths."""
    digest = hashlib.sha256()
    for text in counts:
        digest.update(struct.pack("<Q", len(text)))
        digest.update(text)
    return digest.hexdigest()


def encode_masks(masks: np.ndarray) -> list[bytes]:
    """bool [N, H, W] -> COCO compressed RLE counts, one a mask."""
    column_major = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return [rle["counts"] for rle in coco_mask.encode(column_major)]


def decode_masks(counts: Iterable[bytes], height: int, width: int) -> np.ndarray:
    """COCO compressed RLE counts -> bool [N, H, W]; empty counts are an empty mask.

    Raises InputError when counts do not describe a mask of this size. (pycocotools is not asked: given counts from
    outside it can read past their end.)
    """
    counts = list(counts)
    masks = np.zeros((len(counts), height, width), bool)
    for index, text in enumerate(counts):
        if text:
            masks[index] = _decode(text, height, width)
    return masks


def check_counts(counts: bytes, height: int, width: int) -> None:
    """Raises InputError as `decode_masks` does, without a mask's memory: a few bytes may stand for any size."""
    if counts:
        _runs(counts, height, width)


def _decode(text: bytes, height: int, width: int) -> np.ndarray:
    runs = _runs(text, height, width)
    values = np.arange(len(runs)) % 2 == 1  # the first run is background
    return np.repeat(values, runs).reshape(width, height).T


def _runs(text: bytes, height: int, width: int) -> np.ndarray:
    if len(text) > 7 * (height * width + 1):  # digits of a run times runs of a mask
        raise InputError(f"not an RLE of {height} x {width} pixels: too long")
    try:
        runs = run_lengths(text)
    except ValueError as error:
        raise InputError(f"not an RLE: {error}") from None
    if runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise InputError(f"not an RLE of {height} x {width} pixels")
    return runs
