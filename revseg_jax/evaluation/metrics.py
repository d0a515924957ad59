"""Region similarity J and contour accuracy F of binary masks, by the rules of the DAVIS 2017 evaluation.

J is the intersection over union; 1 when both masks are empty. F is the F-measure of boundary pixels matched within a
tolerance of ceil(0.008 * image diagonal) pixels, measured as a Euclidean disk (Perazzi et al., CVPR 2016); 1 when
neither mask has a boundary, 0 when only one has.

Void pixels, where a benchmark has them, are handled by clearing them in both masks before the call.
"""

from __future__ import annotations

import math

import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the image diagonal


def region_similarity(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """J of every frame: bool [T, H, W] twice -> float64 [T]. Raises ValueError or TypeError for other arrays."""
    _check(pred, truth)
    # NumPy counts whole contiguous arrays ten times as fast as along axes.
    intersection = np.array([np.count_nonzero(p & t) for p, t in zip(pred, truth, strict=True)], np.float64)
    union = np.array([np.count_nonzero(p | t) for p, t in zip(pred, truth, strict=True)], np.float64)
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def contour_accuracy(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F of every frame: bool [T, H, W] twice -> float64 [T]. Raises ValueError or TypeError for other arrays."""
    _check(pred, truth)
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*pred.shape[1:]))
    return np.array([_frame_f(p, t, radius) for p, t in zip(pred, truth, strict=True)], np.float64)


def _frame_f(pred: np.ndarray, truth: np.ndarray, radius: int) -> float:
    # One empty pixel is kept around the objects: there the boundary map is zero as it is in the whole image, and
    # where the image's own last row or column is reached, its special rule applies to the crop as well.
    rows, columns = _bounds(pred | truth, margin=1)
    pred_boundary = boundary_map(pred[rows, columns])
    truth_boundary = boundary_map(truth[rows, columns])
    pred_total, truth_total = np.count_nonzero(pred_boundary), np.count_nonzero(truth_boundary)
    if pred_total == 0 or truth_total == 0:
        return float(pred_total == truth_total)
    precision = _count_near(pred_boundary, truth_boundary, radius) / pred_total
    recall = _count_near(truth_boundary, pred_boundary, radius) / truth_total
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels of bool [H, W] that differ from their right, lower or lower-right neighbour, as bool [H, W].

    The last row looks only to the right, the last column only down, and the last pixel is never a boundary.
    """
    boundary = np.zeros_like(mask)
    boundary[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    boundary[:-1, :] |= mask[:-1, :] ^ mask[1:, :]
    boundary[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return boundary


def _count_near(points: np.ndarray, targets: np.ndarray, radius: int) -> int:
    """How many set pixels of `points` have a set pixel of `targets` within `radius` (a disk, dx^2 + dy^2 <= radius^2).

    The same as counting points inside the targets dilated by the disk, but only looked up at the points: the disk is
    a stack of horizontal runs, and running sums along the rows tell whether a run holds a target.
    """
    height, width = targets.shape
    # sums[y + radius, x + radius + 1] = number of targets in row y up to and including column x.
    sums = np.zeros((height + 2 * radius, width + 2 * radius + 1), np.int32)
    np.cumsum(targets, axis=1, out=sums[radius : radius + height, radius + 1 : radius + 1 + width])
    sums[:, radius + 1 + width :] = sums[:, radius + width, None]
    at = np.flatnonzero(points)  # twenty times as fast as np.nonzero on two axes
    start = at + at // width * (2 * radius + 1)
    sums = sums.ravel()
    near = np.zeros(len(start), bool)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius * radius - dy * dy)
        row = start + (radius + dy) * (width + 2 * radius + 1)
        near |= sums[row + radius + half + 1] != sums[row + radius - half]
    return np.count_nonzero(near)


def _bounds(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Row and column slices of the bounding box of a bool mask [H, W], grown by a margin inside the image."""
    slices = []
    for axis in (1, 0):
        used = np.flatnonzero(mask.any(axis))
        slices.append(slice(max(0, used[0] - margin), used[-1] + 1 + margin) if len(used) else slice(0, 1))
    return slices[0], slices[1]


def _check(pred: np.ndarray, truth: np.ndarray) -> None:
    if pred.shape != truth.shape:
        raise ValueError(f"masks of different shapes cannot be compared: {pred.shape} and {truth.shape}")
    if pred.ndim != 3:
        raise ValueError(f"masks must be [T, H, W], not of shape {pred.shape}")
    if pred.dtype != bool or truth.dtype != bool:
        raise TypeError(f"masks must be bool, not {pred.dtype} and {truth.dtype}")
