"""Small pictures of a chain: re-encoded frames, and masks as SVG paths to lay over them."""

from __future__ import annotations

import base64
import binascii
import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from revseg_jax.data.frames import decode_frame
from revseg_jax.errors import InputError
from revseg_jax.tracker.wire import decode_masks

LONGEST_SIDE = 240  # pixels of a picture in the report; frames of real videos are larger
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """One frame. `uri` holds a JPEG of width x height pixels, which are also the pixels of the two paths.

    `predicted` and `truth` are SVG path data (fill rule even-odd) of the masks, "" where a mask is empty.
    """

    t: int  # index in the original clip
    uri: str
    width: int
    height: int
    predicted: str
    truth: str


def picture(thumb: dict[str, Any]) -> Picture:
    """From an entry of a trace's `thumbs`. Raises InputError when frame or mask cannot be decoded."""
    try:
        jpeg = base64.b64decode(thumb["jpeg"], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"the picture of frame {thumb['t']} is not base64") from None
    image = Image.fromarray(decode_frame(jpeg))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Picture(
        t=int(thumb["t"]),
        uri="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        width=image.width,
        height=image.height,
        predicted=outline_path(_mask(thumb.get("mask"), image.height, image.width)),
        truth=outline_path(_mask(thumb.get("truth"), image.height, image.width)),
    )


def _mask(rle: dict[str, Any] | None, height: int, width: int) -> np.ndarray:
    """bool [height, width] of a COCO RLE of any size, by nearest neighbour; None is the empty mask."""
    if rle is None:
        return np.zeros((height, width), bool)
    rows, columns = rle["size"]
    mask = decode_masks([rle["counts"].encode()], rows, columns)[0]
    return mask[np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)]


def outline_path(mask: np.ndarray) -> str:
    """SVG path data along the pixel edges of a bool [H, W] mask: filled by the even-odd rule it is exactly the mask."""
    follow = defaultdict(list)  # corner -> corners where an edge that starts here ends, the object on its right
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    for neighbour, start, end in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # above
        (padded[1:-1, 2:], (1, 0), (1, 1)),  # right
        (padded[2:, 1:-1], (1, 1), (0, 1)),  # below
        (padded[1:-1, :-2], (0, 1), (0, 0)),  # left
    ):
        for y, x in np.argwhere(inside & ~neighbour).tolist():
            follow[x + start[0], y + start[1]].append((x + end[0], y + end[1]))
    parts = []
    while follow:
        loop = [next(iter(follow))]
        while len(loop) == 1 or loop[-1] != loop[0]:
            ends = follow[loop[-1]]
            corner = ends.pop()
            if not ends:
                del follow[loop[-1]]
            loop.append(corner)
        parts.append(_loop(loop))
    return "".join(parts)


def _loop(corners: list[tuple[int, int]]) -> str:
    """Path data of a closed loop of unit edges, straight runs joined."""
    runs: list[list] = []
    for (x1, y1), (x2, y2) in zip(corners, corners[1:], strict=False):
        command, length = ("h", x2 - x1) if y1 == y2 else ("v", y2 - y1)
        if runs and runs[-1][0] == command and runs[-1][1] * length > 0:
            runs[-1][1] += length
        else:
            runs.append([command, length])
    return f"M{corners[0][0]} {corners[0][1]}" + "".join(f"{c}{n}" for c, n in runs[:-1]) + "z"
