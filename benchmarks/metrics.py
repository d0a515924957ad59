"""J and F of 480p masks: this package against the davis2017-evaluation formulas with OpenCV's dilation, in one run.

    python benchmarks/metrics.py [--frames 64] [--repeats 5]

Needs opencv-python-headless, which the package itself does not use. Both sides score the same masks on one core, in
turns; the ratio is that of the medians. Prints one JSON object. Exit 1 when the scores differ by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time

import numpy as np

from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity

HEIGHT, WIDTH = 480, 854


def blobs(frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Moving ellipses with wavy outlines and their predictions: bool [T, H, W] twice. About a tenth of the image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = np.zeros((2, frames, HEIGHT, WIDTH), bool)
    for t in range(frames):
        centre = np.array([240 + 60 * math.sin(t / 9), 427 + 200 * math.sin(t / 15)])
        for side in range(2):
            cy, cx = centre + side * rng.normal(0, 5, 2)
            angle = np.arctan2(y - cy, x - cx)
            waves = 1 + 0.15 * np.sin(7 * angle + t / 5) + side * 0.03 * np.sin(13 * angle)
            masks[side, t] = ((y - cy) / 90) ** 2 + ((x - cx) / 150) ** 2 < waves**2
    return masks[1], masks[0]


def reference(cv2, pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the published formulas: whole frames, boundaries dilated with a disk by OpenCV."""
    union = (pred | truth).sum((1, 2))
    j = np.where(union == 0, 1.0, (pred & truth).sum((1, 2)) / np.maximum(union, 1))
    radius = math.ceil(0.008 * math.hypot(HEIGHT, WIDTH))
    offsets = np.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
    f = np.zeros(len(pred))
    for t, frames in enumerate(zip(pred, truth, strict=True)):
        boundaries = [boundary(mask) for mask in frames]
        near = [cv2.dilate(edges.astype(np.uint8), disk).astype(bool) for edges in boundaries]
        totals = [edges.sum() for edges in boundaries]
        if not all(totals):
            f[t] = float(not any(totals))
            continue
        precision = (boundaries[0] & near[1]).sum() / totals[0]
        recall = (boundaries[1] & near[0]).sum() / totals[1]
        f[t] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return j, f


def boundary(mask: np.ndarray) -> np.ndarray:
    east, south, corner = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    east[:, :-1], south[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edges = (mask ^ east) | (mask ^ south) | (mask ^ corner)
    edges[-1] = mask[-1] ^ east[-1]
    edges[:, -1] = mask[:, -1] ^ south[:, -1]
    edges[-1, -1] = False
    return edges


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--frames", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    try:
        import cv2
    except ImportError:
        sys.exit("the reference needs OpenCV: pip install opencv-python-headless")
    cv2.setNumThreads(1)
    pred, truth = blobs(options.frames, seed=0)
    ours, theirs = [], []
    for _ in range(options.repeats):
        begin = time.process_time()
        j, f = region_similarity(pred, truth), contour_accuracy(pred, truth)
        middle = time.process_time()
        expected_j, expected_f = reference(cv2, pred, truth)
        ours.append(middle - begin)
        theirs.append(time.process_time() - middle)
    gap = max(np.abs(j - expected_j).max(), np.abs(f - expected_f).max())
    result = {
        "frames": options.frames,
        "size": [HEIGHT, WIDTH],
        "milliseconds_a_frame": 1000 * statistics.median(ours) / options.frames,
        "reference_milliseconds_a_frame": 1000 * statistics.median(theirs) / options.frames,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "largest_difference": float(gap),
        "mean_j": float(j.mean()),
        "mean_f": float(f.mean()),
        "opencv": cv2.__version__,
    }
    print(json.dumps(result))
    sys.exit(gap > 1e-9)


if __name__ == "__main__":
    main()
