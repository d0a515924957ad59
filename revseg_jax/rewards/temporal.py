"""r_t: how good a frame the keyframe is, judged by the area of the object's ground-truth box in it.

Areas are in pixels^2 of the original image, one for each sampled frame that was really shown (no padding), and 0 where
the object is absent. The two baselines at the end say what a policy gets without looking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def soft_scores(areas: np.ndarray) -> np.ndarray:
    """Soft temporal reward of every frame: float [N] -> float64 [N].

    (S_k - min S) / (max S - min S) where the object is visible, 0 where it is not; the minimum is over all frames, so
    it is 0 as soon as the object is absent somewhere. The paper leaves max = min open: 1 on visible frames.
    """
    areas = np.asarray(areas, np.float64)
    if not areas.size:
        return areas
    low, high = areas.min(), areas.max()
    scores = (areas - low) / (high - low) if high > low else np.ones_like(areas)
    return np.where(areas > 0, scores, 0.0)


def temporal_reward(kind: str, frame_idx: int | None, areas: np.ndarray) -> float:
    """Reward of choosing frame `frame_idx`; kind is none (always 0), binary (object visible) or soft.

    0 for a frame outside [0, N), or None: no keyframe was chosen.
    """
    if kind not in ("none", "binary", "soft"):
        raise ValueError(f"unknown temporal reward {kind!r}")
    if kind == "none" or frame_idx is None or not 0 <= frame_idx < len(areas):
        return 0.0
    return float(areas[frame_idx] > 0) if kind == "binary" else float(soft_scores(areas)[frame_idx])


def best_constant_keyframe(areas: Sequence[np.ndarray]) -> tuple[float, int]:
    """Mean soft score over clips, float [N] each, of always answering the one best index; and that index.

    Shorter clips than the index score 0, as the answer would not parse.
    """
    totals = np.zeros(max(map(len, areas)))
    for clip in areas:
        totals[: len(clip)] += soft_scores(clip)
    best = int(totals.argmax())
    return float(totals[best] / len(areas)), best


def random_visible_keyframe(areas: Sequence[np.ndarray]) -> float:
    """Expected soft score over clips, float [N] each, of a frame drawn among those that show the object."""
    scores = [soft_scores(clip)[np.asarray(clip) > 0] for clip in areas]
    return float(np.mean([s.mean() if s.size else 0.0 for s in scores]))
