"""Advantages of a group of rollouts. NumPy: they are a few numbers a step."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6  # keeps a group without spread at advantage 0


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / std within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2). rewards float [B, G]."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return (centred / (rewards.std(axis=1, keepdims=True) + EPSILON)).astype(np.float32)
