"""r_s: whether the box fits the object in the keyframe. Boxes are x1, y1, x2, y2 in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IOU_THRESHOLD = 0.5


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [..., 4] (broadcast); 0 where a box is empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.clip(sides, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def spatial_reward(kind: str, box: Sequence[float] | None, truth_box: Sequence[float]) -> float:
    """kind threshold: 1 when IoU > 0.5, else 0; kind iou: the IoU itself.

    0 without a box, and where the object is absent from the keyframe (truth_box all zeros).
    """
    if kind not in ("threshold", "iou"):
        raise ValueError(f"unknown spatial reward {kind!r}")
    if box is None:
        return 0.0
    iou = float(box_iou(box, truth_box))
    return float(iou > IOU_THRESHOLD) if kind == "threshold" else iou
