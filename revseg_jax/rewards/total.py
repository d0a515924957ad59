"""The reward of a rollout: r = w_f r_f + w_t 1[S1] r_t + 1[S1 and S2] (w_s r_s + w_m r_m) + overlong penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from revseg_jax.chain.parsing import Turn1, Turn2
from revseg_jax.config import RewardsConfig
from revseg_jax.rewards.format import format_reward
from revseg_jax.rewards.mask import mask_reward
from revseg_jax.rewards.spatial import spatial_reward
from revseg_jax.rewards.temporal import temporal_reward


@dataclass(frozen=True)
class RewardWeights:
    format: float
    temporal: float
    spatial: float
    mask: float = 0.0


PAPER_TEXT = RewardWeights(1.0, 1.0, 1.0)
"""The plain sum that the paper prints."""

PAPER_CURVES = RewardWeights(0.25, 0.15, 0.60)
"""What the authors' training curves show.

Their total-reward curve is 0.125 r_f + 0.075 r_t + 0.300 r_s of their component curves (residual 0.0006) and no
multiple of the plain sum. These weights are the same times two, so that they add up to 1 and a perfect chain earns 1;
the curve is half of this total. GRPO divides a group's rewards by their deviation, so the factor changes no update.
"""

PRESETS = {"paper_text": PAPER_TEXT, "paper_curves": PAPER_CURVES}


@dataclass(frozen=True)
class RolloutReward:
    """What one rollout earned.

    Attributes:
        format, temporal, spatial, mask: the terms before weighting, in [0, 1]; 0 where a failed turn gates them.
        total: the weighted sum and the overlong penalties, turn1 + turn2.
        turn1, turn2: what each turn earned by itself, weighted: its half of the format term, and the temporal term for
            turn 1, the spatial and mask terms for turn 2; with its overlong penalty. The only turn earns all of it.
        turns: turns that took place, 1 or 2.
        overlong: the penalties of both turns, 0 or less.
        task1, task2: turn1 and turn2 without them.
    """

    format: float
    temporal: float
    spatial: float
    mask: float
    total: float
    turn1: float
    turn2: float
    turns: int
    overlong: float = 0.0
    task1: float = 0.0
    task2: float = 0.0


def weights_from(config: RewardsConfig) -> RewardWeights:
    """The preset's weights, or the config's own for `custom`. The mask weight is the config's in any case."""
    if config.preset == "custom":
        return RewardWeights(config.format or 0.0, config.temporal or 0.0, config.spatial or 0.0, config.mask)
    return replace(PRESETS[config.preset], mask=config.mask)


def combine(
    weights: RewardWeights,
    format: np.ndarray,
    temporal: np.ndarray,
    spatial: np.ndarray,
    mask: np.ndarray,
    ok1: np.ndarray,
    ok2: np.ndarray,
) -> np.ndarray:
    """Total reward with the success gates; scalars or arrays of one shape. ok1, ok2: whether each turn succeeded."""
    both = np.logical_and(ok1, ok2)
    return (
        weights.format * np.asarray(format)
        + np.where(ok1, weights.temporal * np.asarray(temporal), 0.0)
        + np.where(both, weights.spatial * np.asarray(spatial) + weights.mask * np.asarray(mask), 0.0)
    )


def score_rollout(
    config: RewardsConfig,
    turn1: Turn1,
    turn2: Turn2 | None,
    box: Sequence[float] | None,
    areas: np.ndarray,
    boxes: np.ndarray,
    j: float = 0.0,
    f: float = 0.0,
    overlong: tuple[float, float] = (0.0, 0.0),
) -> RolloutReward:
    """Scores one chain.

    Args:
        config: kinds and weights.
        turn1, turn2: what was parsed from the answers; turn2 is None when turn 1 failed and ended the rollout.
        box: the answer's box in original pixels, clipped (`chain.geometry.box_to_original`); None counts as failure.
        areas, boxes: float [N] and [N, 4], ground-truth boxes in original pixels at the frames shown; 0 when absent.
        j, f: means over the clip's frames of the tracker's masks, when they are wanted.
        overlong: the penalty of each turn, 0 or less.
    """
    ok1 = turn1.ok
    ok2 = ok1 and turn2 is not None and turn2.ok and box is not None
    weights = weights_from(config)
    temporal = temporal_reward(config.temporal_kind, turn1.frame_idx, areas) if ok1 else 0.0
    spatial = spatial_reward(config.spatial_kind, box, boxes[turn1.frame_idx]) if ok2 else 0.0
    mask = mask_reward(config.mask_kind, j, f) if ok2 else 0.0
    first = combine(weights, format_reward(turn1, None), temporal, 0.0, 0.0, ok1, False)
    total = combine(weights, format_reward(turn1, turn2), temporal, spatial, mask, ok1, ok2)
    turns = 1 if turn2 is None or turn2.in_first else 2
    first = first if turns == 2 else total
    penalties = overlong if turns == 2 else (sum(overlong), 0.0)
    return RolloutReward(
        format=format_reward(turn1, turn2),
        temporal=temporal,
        spatial=spatial,
        mask=mask,
        total=float(total + sum(overlong)),
        turn1=float(first + penalties[0]),
        turn2=float(total - first + penalties[1]),
        turns=turns,
        overlong=float(sum(overlong)),
        task1=float(first),
        task2=float(total - first),
    )
