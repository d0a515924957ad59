"""One chain as a JSON-ready record: everything that was said, decided and earned, for people to read."""

from __future__ import annotations

from typing import Any

from revseg_jax.data.example import Batch
from revseg_jax.rewards.total import RolloutReward
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.layout import PromptEncoder

REWARDS = ("format", "temporal", "spatial", "mask", "overlong", "total")


def trace_record(
    encoder: PromptEncoder, batch: Batch, b: int, sample: int, rollout: Rollout, reward: RolloutReward, step: int
) -> dict[str, Any]:
    """The record of rollout `sample` of prompt `b`. Boxes are in original pixels; `keyframe` indexes the shown frames,
    `frame` the original clip; visual tokens stand as one placeholder in the prompts."""
    count = int(batch.frame_count[b])
    keyframe = rollout.turn1.frame_idx
    truth = batch.boxes[b, keyframe].tolist() if keyframe is not None and batch.areas[b, keyframe] > 0 else None
    frame = int(batch.sampled[b, keyframe]) if keyframe is not None else None
    return {
        "step": step,
        "video_id": batch.video_id[b],
        "expression_id": batch.expression_id[b],
        "query": batch.query[b],
        "kind": batch.kind[b],
        "group": sample,
        "prompt1": encoder.turn1_prompt(batch.query[b], count, float(batch.seconds[b])),
        "answer1": rollout.answer1,
        "prompt2": encoder.turn2_prompt(rollout.turn1.description) if rollout.answer2 is not None else None,
        "answer2": rollout.answer2,
        "keyframe": keyframe,
        "frame": frame,
        "seconds": frame / float(batch.fps[b]) if frame is not None else None,
        "description": rollout.turn1.description,
        "box": list(rollout.box) if rollout.box else None,
        "truth_box": truth,
        "failure": rollout.failure,
        "reward": {name: getattr(reward, name) for name in REWARDS},
        "size": batch.size[b].tolist(),
    }
