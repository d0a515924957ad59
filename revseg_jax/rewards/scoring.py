"""Rewards of a whole step: mask scores are asked of the sidecar at once and collected when everything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from revseg_jax.config import ChainConfig, RewardsConfig
from revseg_jax.data.example import Batch
from revseg_jax.rewards.overlong import overlong_penalty
from revseg_jax.rewards.total import RolloutReward, score_rollout, weights_from
from revseg_jax.rollout.chains import Rollout
from revseg_jax.tracker.client import Scores, TrackerClient


class PendingRewards(NamedTuple):
    """A prompt's group whose mask scores are under way.

    Attributes:
      chains: [G]
      scores: of its successful rollouts, in order; None when no mask reward is wanted
    """

    chains: Sequence[Rollout]
    scores: Future[Scores] | None


def request_rewards(
    client: TrackerClient | None, config: RewardsConfig, batch: Batch, row: int, chains: Sequence[Rollout]
) -> PendingRewards:
    """Sends the boxes of all successful rollouts of prompt `row` to the sidecar and returns without waiting.

    The tracker's clip is the shown frames at original size, so that a keyframe needs no mapping and no other frame is
    decoded; the mask reward is the mean over them, or over `mask_frames` of them.
    """
    prompts = [(rollout.turn1.frame_idx, rollout.box) for rollout in chains if rollout.ok]
    if client is None or not weights_from(config).mask or not prompts:
        return PendingRewards(chains, None)
    clip, contour = batch.jpegs[row], config.mask_kind == "jf"
    frames = _spread(len(clip), config.mask_frames)
    return PendingRewards(chains, client.score_async(clip, prompts, batch.masks[row], frames, contour))


def collect_rewards(
    config: RewardsConfig, chain: ChainConfig, batch: Batch, row: int, pending: PendingRewards
) -> list[RolloutReward]:
    """Waits for the scores of prompt `row` and gives each rollout its reward. Raises SidecarAway when no sidecar
    answers."""
    count, rewards = batch.frame_count[row], []
    scores = iter(zip(*_means(pending.scores.result()), strict=True)) if pending.scores is not None else None
    for rollout in pending.chains:
        j, f = next(scores) if rollout.ok and scores is not None else (0.0, 0.0)
        reward = score_rollout(
            config,
            rollout.turn1,
            rollout.turn2,
            rollout.box,
            batch.areas[row, :count],
            batch.boxes[row, :count],
            j=float(j),
            f=float(f),
            overlong=overlong_penalties(config, chain, rollout),
        )
        rewards.append(reward)
    return rewards


def overlong_penalties(config: RewardsConfig, chain: ChainConfig, rollout: Rollout) -> tuple[float, float]:
    """Of both turns, 0 or less.

    A turn's buffer is `overlong_tokens`, but at most a fifth of the turn's own limit, the paper's share (DAPO, arXiv
    2503.14476: 4096 tokens of 20480): of short answers a fixed one would punish all.
    """
    lengths = ((rollout.tokens1, chain.turn1_tokens), (rollout.tokens2, chain.turn2_tokens))
    first, second = (
        config.overlong_penalty * overlong_penalty(length, limit, min(config.overlong_tokens, limit / 5))
        for length, limit in lengths
    )
    return first, second


def _means(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return scores.j, np.nan_to_num(scores.f)


def _spread(total: int, count: int) -> list[int] | None:
    """`count` frames evenly spread over `total`, with both ends when there are two or more; None means all."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist() if 0 < count < total else None
