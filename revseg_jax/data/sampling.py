"""The one frame sampler: training, evaluation and `revseg segment` all show the policy the frames chosen here."""

from __future__ import annotations

import numpy as np


def sample_frames(total: int, wanted: int) -> np.ndarray:
    """Indices of the frames shown in turn 1, spread uniformly over a clip of `total` frames.

    Returns int64 [n], strictly increasing original frame indices with n = min(total, wanted); the first and the last
    frame are included when n > 1, the middle frame is taken when n == 1. Integer arithmetic only, so the same
    indices come out on every platform. Raises ValueError when either number is below 1.
    """
    if total < 1 or wanted < 1:
        raise ValueError(f"cannot sample {wanted} frames of a clip of {total}: both must be at least 1")
    count = min(total, wanted)
    if count == 1:
        return np.array([(total - 1) // 2], np.int64)
    # round half up of i * (total - 1) / (count - 1)
    return (2 * np.arange(count, dtype=np.int64) * (total - 1) + count - 1) // (2 * (count - 1))
