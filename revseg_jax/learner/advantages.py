"""Advantages of groups of rollouts, by turn. NumPy in float64: they are a few numbers a step."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6  # keeps a group without spread at advantage 0


def turn_advantages(rewards: np.ndarray, second: np.ndarray, kind: str, credit: str) -> np.ndarray:
    """Advantages float32 [B, G, 2] of both turns of B x G rollouts.

    rewards: float [B, G, 2], what each turn earned; second: bool [B, G], whether there was a second turn.
    kind: see `group_advantages`. credit "trajectory": both turns share the advantage of the total; "turn": each turn
    has that of its reward to go (its own and later ones), compared among the rollouts of the group that took it.
    """
    total = rewards.sum(-1)
    if credit == "trajectory":
        shared = group_advantages(total, np.ones_like(second), kind)
        return np.stack([shared, shared], -1)
    to_go = (total, np.ones_like(second)), (rewards[..., 1], second)
    return np.stack([group_advantages(values, taken, kind) for values, taken in to_go], -1)


def group_advantages(values: np.ndarray, taken: np.ndarray, kind: str) -> np.ndarray:
    """Advantages float32 [B, G] within each group, among the rollouts where bool [B, G] `taken`; 0 elsewhere.

    kind "grpo": (r - mean) / std (DeepSeekMath, arXiv 2402.03300, section 4.1.2);
    "dr_grpo": r - mean (Understanding R1-Zero-Like Training, arXiv 2503.20783, section 3.2);
    "rloo": r - mean of the other rollouts (Back to Basics, arXiv 2402.14740, section 3.3).
    """
    count = taken.sum(axis=1, keepdims=True)
    mean = np.where(taken, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(taken, values - mean, 0.0)
    if kind == "grpo":
        deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count, 1))
        centred = centred / (deviation + EPSILON)
    elif kind == "rloo":
        centred = centred * count / np.maximum(count - 1, 1)  # r - (sum - r) / (n - 1) = n / (n - 1) (r - sum / n)
    return centred.astype(np.float32)
