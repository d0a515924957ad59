"""Advantages of groups of rollouts, by turn. NumPy in float64: they are a few numbers a step."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6  # added to the deviation that grpo divides by
NO_SPREAD = 1e-6  # deviation of a group's rewards up to which they count as equal


def turn_advantages(
    rewards: np.ndarray, second: np.ndarray, kind: str, credit: str, penalty: np.ndarray | None = None
) -> np.ndarray:
    """Advantages float32 [B, G, 2] of both turns of B x G rollouts.

    rewards: float [B, G, 2], what each turn earned; second: bool [B, G], whether there was a second turn.
    kind: see `group_advantages`. credit "trajectory": both turns share the advantage of the total; "turn": each turn
    has that of its reward to go (its own and later ones), compared among the rollouts of the group that took it.
    penalty: float [B, G, 2], what the KL takes from each turn's reward; None: nothing.
    """
    earned = rewards_to_go(rewards, second, credit)
    lost = rewards_to_go(np.zeros_like(rewards) if penalty is None else penalty, second, credit)
    found = [group_advantages(r, taken, kind, less) for (r, taken), (less, _) in zip(earned, lost, strict=True)]
    return np.stack([found[0], found[-1]], -1)


def rewards_to_go(rewards: np.ndarray, second: np.ndarray, credit: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the rollouts of a group are compared by, as `turn_advantages` says: (float [B, G], bool [B, G] where it
    counts), once for both turns or for each."""
    total = rewards.sum(-1), np.ones_like(second)
    return [total] if credit == "trajectory" else [total, (rewards[..., 1], second)]


def groups_with_spread(rewards: np.ndarray, second: np.ndarray, credit: str) -> np.ndarray:
    """bool [B], whether any of a group's rewards to go spread; without, grpo's advantages are all 0."""
    spread = [_centred(*pair)[1] > NO_SPREAD for pair in rewards_to_go(rewards, second, credit)]
    return np.any(spread, axis=0)[:, 0]


def group_advantages(values: np.ndarray, taken: np.ndarray, kind: str, penalty: np.ndarray) -> np.ndarray:
    """Advantages float32 [B, G] of r = values - penalty within each group, among the rollouts where bool [B, G]
    `taken`; 0 elsewhere.

    kind "grpo": (r - mean) / std (DeepSeekMath, arXiv 2402.03300, section 4.1.2), the std being that of the values
    without the penalty, and 0 where they do not spread: divided by its own std, a KL of any size, or its rounding,
    would teach as much as a reward;
    "dr_grpo": r - mean (Understanding R1-Zero-Like Training, arXiv 2503.20783, section 3.2);
    "rloo": r - mean of the other rollouts (Back to Basics, arXiv 2402.14740, section 3.3).
    """
    centred, _ = _centred(values - penalty, taken)
    if kind == "grpo":
        deviation = _centred(values, taken)[1]
        centred = np.where(deviation > NO_SPREAD, centred / (deviation + EPSILON), 0.0)
    elif kind == "rloo":
        count = taken.sum(axis=1, keepdims=True)
        centred = centred * count / np.maximum(count - 1, 1)  # r - (sum - r) / (n - 1) = n / (n - 1) (r - sum / n)
    return centred.astype(np.float32)


def _centred(values: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values less their group's mean [B, G], 0 where not `taken`, and their deviation [B, 1]."""
    count = np.maximum(taken.sum(axis=1, keepdims=True), 1)
    mean = np.where(taken, values, 0.0).sum(axis=1, keepdims=True) / count
    centred = np.where(taken, values - mean, 0.0)
    return centred, np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
