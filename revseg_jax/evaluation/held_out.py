"""Scores a policy on prepared clips: the whole chain, greedily, and J&F of its masks on every frame."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from revseg_jax.config import Config
from revseg_jax.data.clip import Clip, decode_mask, encode_mask
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.chains import answers, track, tracker_prompts
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.rewards.temporal import best_constant_keyframe, random_visible_keyframe
from revseg_jax.rewards.total import RolloutReward, score_rollout
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.rollout.traces import trace_record
from revseg_jax.tracker.client import TrackerClient

THUMBNAILS = 8  # frames shown of a chain in the report


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples.

    Attributes:
      j, f, jf: 0-100, over all frames of a clip, then over examples; a failed chain counts as empty masks
      format, temporal, spatial, mask: the reward terms, 0-1; turns: how many took place, 1-2
      best_constant_keyframe, random_visible_keyframe: what choosing a keyframe blindly would earn as temporal reward
      by_kind: J&F of each kind of query
    """

    clips: int
    j: float
    f: float
    jf: float
    format: float
    temporal: float
    spatial: float
    mask: float
    turns: float
    best_constant_keyframe: float
    random_visible_keyframe: float
    by_kind: dict[str, float]


def evaluate_policy(
    engine: RolloutEngine,
    params: Any,
    source: ClipSource,
    config: Config,
    client: TrackerClient | None,
    label: str,
    trace_thumbnails: int = 0,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Runs the chain on `data.test_clips` examples spread over the source (0: all).

    engine: a greedy one. client None leaves out the tracking: J, F and mask are then 0. Returns the scores and one
    trace a chain, `trace_thumbnails` of them, spread over the source, with small pictures of the masks.
    """
    chain = engine.encoder.chain
    wanted = config.data.test_clips or len(source)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(wanted, len(source))).round().astype(int))
    illustrated = set(np.linspace(0, len(chosen) - 1, min(trace_thumbnails, len(chosen))).round().astype(int).tolist())
    rows, traces, areas = [], [], []
    bar = tqdm(total=len(chosen), desc=f"evaluate {label}", unit="chain")
    with ThreadPoolExecutor(2) as pool:
        for clips, batch, chains in answers(engine, params, source, chosen, chain):
            tracked = pool.map(lambda pair: track(client, *pair), tracker_prompts(clips, batch, chains))
            for b, masks in enumerate(tracked):
                rollout, count = chains[b], int(batch.frame_count[b])
                truth = np.stack([decode_mask(m, clips[b].height, clips[b].width) for m in clips[b].masks])
                j = f = np.zeros(len(truth))
                if client is not None:
                    j, f = region_similarity(masks, truth), contour_accuracy(masks, truth)
                shown = batch.sampled[b, :count]
                reward = score_rollout(
                    config.rewards,
                    rollout.turn1,
                    rollout.turn2,
                    rollout.box,
                    batch.areas[b, :count],
                    batch.boxes[b, :count],
                    j=float(j[shown].mean()),
                    f=float(f[shown].mean()),
                )
                rows.append((batch.kind[b], j.mean(), f.mean(), reward))
                areas.append(batch.areas[b, :count])
                record = trace_record(chain, batch, b, 0, rollout, reward, step=0)
                record |= {"j": float(j.mean()), "f": float(f.mean()), "frames": len(truth), "label": label}
                if len(traces) in illustrated:
                    record["thumbs"] = _thumbnails(clips[b], masks, truth, rollout, shown)
                traces.append(record)
                bar.update()
    bar.close()
    return _summary(rows, areas), traces


def _summary(rows: list[tuple[str, float, float, RolloutReward]], areas: list[np.ndarray]) -> Evaluation:
    kinds = np.array([row[0] for row in rows])
    j, f = np.array([row[1] for row in rows]) * 100, np.array([row[2] for row in rows]) * 100
    jf = (j + f) / 2

    def mean(name: str) -> float:
        return float(np.mean([getattr(row[3], name) for row in rows]))

    return Evaluation(
        clips=len(rows),
        j=float(j.mean()),
        f=float(f.mean()),
        jf=float(jf.mean()),
        **{name: mean(name) for name in ("format", "temporal", "spatial", "mask", "turns")},
        best_constant_keyframe=float(best_constant_keyframe(areas)[0]),
        random_visible_keyframe=float(random_visible_keyframe(areas)),
        by_kind={str(kind): float(jf[kinds == kind].mean()) for kind in np.unique(kinds)},
    )


def _thumbnails(
    clip: Clip, masks: np.ndarray, truth: np.ndarray, rollout: Rollout, shown: np.ndarray
) -> list[dict[str, Any]]:
    """A few frames with the predicted and the true mask, the keyframe among them."""
    frames = set(np.linspace(0, len(clip.frames) - 1, min(THUMBNAILS, len(clip.frames))).round().astype(int).tolist())
    if rollout.ok:
        frames.add(int(shown[rollout.turn1.frame_idx]))

    def text(mask: np.ndarray) -> dict[str, Any] | None:
        rle = encode_mask(mask)
        return rle and {"size": list(rle["size"]), "counts": rle["counts"].decode()}

    return [
        {
            "t": t,
            "jpeg": base64.b64encode(clip.frames[t]).decode(),
            "mask": text(masks[t]),
            "truth": text(truth[t]),
        }
        for t in sorted(frames)
    ]
