"""What the learner gets from the sampler: arrays whose shapes depend on the config only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class RolloutBatch(NamedTuple):
    """G rollouts for each of B prompts, in the slots of `revseg_jax.rollout.layout.SlotLayout` (P prefix, S suffix).

    Attributes:
      frames: uint8 [B, N, side, side, 3], the video as the policy saw it
      prefix_tokens: int32 [B, P]; prefix_positions: int32 [B, 3, P]; prefix_mask: bool [B, P]
      keyframes: uint8 [B, G, side, side, 3], the turn-2 images of a prompt, each once and then zeros
      keyframe_index: int32 [B, G], which of its prompt's keyframes a rollout looks at; -1 without a second turn
      tokens: int32 [B, G, S]; positions: int32 [B, G, 3, S]; mask: bool [B, G, S], False for padding
      generated: bool [B, G, S], True for tokens that the policy sampled
      logprobs: float32 [B, G, S], of the sampled tokens when they were sampled; 0 elsewhere
    """

    frames: Array
    prefix_tokens: Array
    prefix_positions: Array
    prefix_mask: Array
    keyframes: Array
    keyframe_index: Array
    tokens: Array
    positions: Array
    mask: Array
    generated: Array
    logprobs: Array


def join(parts: Sequence[RolloutBatch], rows: Sequence[np.ndarray]) -> RolloutBatch:
    """One batch of the rows of several, on the host. rows: int [B of the part] for each part, where its rows go.

    Images are gigabytes: each goes to its place at once, and none is copied twice.
    """
    count = sum(map(len, rows))
    whole = RolloutBatch(*(np.empty((count, *array.shape[1:]), array.dtype) for array in parts[0]))
    for part, places in zip(parts, rows, strict=True):
        for target, array in zip(whole, part, strict=True):
            target[places] = array
    return whole
