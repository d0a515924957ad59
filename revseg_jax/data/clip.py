"""The one schema of all datasets, synthetic or real: a video's encoded frames with one query and its true masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as coco

from revseg_jax.data.frames import decode_frame
from revseg_jax.errors import InputError

__all__ = ["Clip", "boxes_and_areas", "decode_frame", "decode_mask", "encode_mask", "union"]


@dataclass(frozen=True)
class Clip:
    """A (video, expression) pair of T frames. Nothing is decoded: use `decode_frame` and `decode_mask`."""

    video_id: str
    expression_id: str
    query: str
    kind: str  # the dataset's own type of query, for example referring | motion | reasoning
    fps: float  # of `frames`
    height: int  # pixels of the original frames, as are all masks and boxes
    width: int
    frames: tuple[bytes, ...] = field(repr=False)  # encoded images, as they came but upright
    # COCO RLE {"size": [h, w], "counts": bytes}, union of the expression's objects; None = absent
    masks: tuple[dict | None, ...] = field(repr=False)
    frame_names: tuple[str, ...] = field(repr=False)  # of the files they came from, without the ending

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


def encode_mask(mask: np.ndarray) -> dict | None:
    """COCO RLE of a bool [H, W] mask, None when it is empty."""
    return coco.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None


def decode_mask(rle: dict | None, height: int, width: int) -> np.ndarray:
    """bool [height, width] of a COCO RLE; None is the empty mask. Raises InputError when the sizes disagree."""
    if rle is None:
        return np.zeros((height, width), bool)
    if tuple(rle["size"]) != (height, width):
        raise InputError(f"a mask of {rle['size'][1]}x{rle['size'][0]} pixels does not fit a {width}x{height} frame")
    return coco.decode(rle).astype(bool)


def union(rles: list[dict | None]) -> dict | None:
    """COCO RLE of the union of masks of one frame; None when all are absent."""
    present = [rle for rle in rles if rle is not None]
    return coco.merge(present) if len(present) > 1 else (present[0] if present else None)


def boxes_and_areas(masks, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of T masks (COCO RLE or None), without decoding them.

    Returns float32 [T, 4]: x1, y1, x2, y2 in pixels of the height x width frame, half-open (x2 is the last column + 1),
    zeros where the object is absent; and float32 [T]: the area of the BOX in pixels^2, the S_t of the temporal reward.
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for t, rle in enumerate(masks):
        if rle is not None:
            if tuple(rle["size"]) != (height, width):
                raise InputError(f"mask {t} is {rle['size'][1]}x{rle['size'][0]} pixels, the frame {width}x{height}")
            x, y, w, h = coco.toBbox(rle)
            boxes[t] = (x, y, x + w, y + h) if w > 0 and h > 0 else 0
    return boxes, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
