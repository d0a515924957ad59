"""Between the two frames of reference of a box: the resized square keyframe and the original image.

The keyframe is squeezed to a square, so x and y scale differently. Boxes are x1, y1, x2, y2 with x2 and y2 exclusive.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

Box = tuple[float, float, float, float]


def box_to_original(box: Sequence[float], keyframe_size: int, height: int, width: int) -> Box | None:
    """From pixels of the square keyframe to pixels of the original image, clipped to it.

    None when nothing of the box is left inside the image, in float32: so it goes to the tracker.
    """
    x1, y1, x2, y2 = box
    x1, x2 = (min(max(x * width / keyframe_size, 0.0), float(width)) for x in (x1, x2))
    y1, y2 = (min(max(y * height / keyframe_size, 0.0), float(height)) for y in (y1, y2))
    left, top, right, bottom = array("f", (x1, y1, x2, y2))
    return (x1, y1, x2, y2) if left < right and top < bottom else None


def box_to_keyframe(box: Sequence[float], keyframe_size: int, height: int, width: int) -> Box:
    """From pixels of the original image to pixels of the square keyframe."""
    x1, y1, x2, y2 = box
    x_scale, y_scale = keyframe_size / width, keyframe_size / height
    return x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale
