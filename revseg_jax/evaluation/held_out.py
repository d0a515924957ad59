"""Scores a policy on prepared clips: the whole chain, greedily, and J&F of its masks on every frame."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from revseg_jax.config import Config
from revseg_jax.data.clip import Clip, decode_mask, encode_mask
from revseg_jax.data.example import Batch
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.chains import answers, one_behind, track, tracker_prompts, tracking_threads
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.parallel.processes import agree, leads
from revseg_jax.parallel.rows import gather_shares, process_share
from revseg_jax.rewards.temporal import best_constant_keyframe, random_visible_keyframe
from revseg_jax.rewards.total import RolloutReward, score_rollout
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.rollout.layout import PromptEncoder
from revseg_jax.rollout.traces import trace_record
from revseg_jax.tracker.client import Prompt, TrackerClient
from revseg_jax.tracker.connection import SidecarAway

THUMBNAILS = 8  # frames shown of a chain in the report


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples.

    Attributes:
      j, f, jf: 0-100, over all frames of a clip, then over the examples whose target is visible in any of them: where
        there is none, failing would earn 100. A failed chain counts as empty masks
      format, temporal, spatial, mask: the reward terms, 0-1; turns: how many took place, 1-2
      best_constant_keyframe, random_visible_keyframe: what choosing a keyframe blindly would earn as temporal reward
      by_kind: J&F of each kind of query, those about what is not there included
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


class Scored(NamedTuple):
    """One example: its query's kind, whether its target is visible in any frame, J and F (0-1), what its chain earned,
    the target's areas in the sampled frames."""

    kind: str
    visible: bool
    j: float
    f: float
    reward: RolloutReward
    areas: np.ndarray
    trace: dict[str, Any]


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
    trace a chain, `trace_thumbnails` of them, spread over the source, with small pictures of the masks. Several
    processes share the examples, and all return the same. Raises SidecarAway, in all of them, when one of them finds no
    sidecar any more.
    """
    chosen = _spread(len(source), config.data.test_clips or len(source))
    illustrated = chosen[_spread(len(chosen), trace_thumbnails)]
    # All processes sample equally often: what one has less, it samples once more and leaves out.
    share, count = process_share(engine.placement)
    own = chosen[share::count]
    filled = np.resize([*own, *chosen[:1]], -(-len(chosen) // count))
    scored: list[Scored] = []
    away: str | None = None
    bar = tqdm(total=len(own), desc=f"evaluate {label}", unit="chain", disable=not leads() or None)

    def track_and_score(batch: Batch, b: int, clip: Clip, prompt: Prompt | None, rollout: Rollout) -> Scored:
        masks = track(client, clip, prompt) if client else None
        pictures = THUMBNAILS * int(batch.index[b] in illustrated)
        return _score(config, engine.encoder, clip, batch, b, rollout, masks, label, pictures)

    def begin(clips: list[Clip], batch: Batch, chains: list[Rollout]) -> Iterator[Scored]:
        if away:
            return iter(())  # the other processes sample with this one
        prompts = [prompt for _, prompt in tracker_prompts(clips, batch, chains)]
        return pool.map(partial(track_and_score, batch), range(len(clips)), clips, prompts, chains)

    with tracking_threads(client) as pool:
        for scores in one_behind(starmap(begin, answers(engine, params, source, filled, config.chain))):
            try:
                for score in islice(scores, len(own) - len(scored)):
                    scored.append(score)
                    bar.update()
            except SidecarAway as error:
                if jax.process_count() == 1:
                    raise
                away = str(error)
    bar.close()
    if away := agree(away):
        raise SidecarAway(away)
    parts = gather_shares(engine.placement, scored)
    everything = [parts[i % len(parts)][i // len(parts)] for i in range(len(chosen))]
    return _summary(everything), [one.trace for one in everything]


def _spread(count: int, wanted: int) -> np.ndarray:
    """int: so many of `count` places, or all, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def _score(
    config: Config,
    encoder: PromptEncoder,
    clip: Clip,
    batch: Batch,
    b: int,
    rollout: Rollout,
    masks: np.ndarray | None,
    label: str,
    thumbnails: int,
) -> Scored:
    """Of example b of the batch. masks: bool [T, H, W], or None where nothing was tracked."""
    truth = np.stack([decode_mask(m, clip.height, clip.width) for m in clip.masks])
    j = f = np.zeros(len(truth))
    if masks is not None:
        j, f = region_similarity(masks, truth), contour_accuracy(masks, truth)
    count = int(batch.frame_count[b])
    shown, areas = batch.sampled[b, :count], batch.areas[b, :count]
    reward = score_rollout(
        config.rewards,
        rollout.turn1,
        rollout.turn2,
        rollout.box,
        areas,
        batch.boxes[b, :count],
        j=float(j[shown].mean()),
        f=float(f[shown].mean()),
    )
    trace = trace_record(encoder, batch, b, 0, rollout, reward, step=0)
    trace |= {"j": float(j.mean()), "f": float(f.mean()), "frames": len(truth), "label": label}
    if thumbnails:
        shapes = np.zeros_like(truth) if masks is None else masks
        trace["thumbs"] = _thumbnails(clip, shapes, truth, rollout, shown, thumbnails)
    return Scored(str(batch.kind[b]), bool(truth.any()), float(j.mean()), float(f.mean()), reward, areas, trace)


def _summary(scored: list[Scored]) -> Evaluation:
    kinds = np.array([one.kind for one in scored])
    j, f = np.array([one.j for one in scored]) * 100, np.array([one.f for one in scored]) * 100
    jf, areas = (j + f) / 2, [one.areas for one in scored]
    visible = np.array([one.visible for one in scored])
    visible |= not visible.any()

    def mean(name: str) -> float:
        return float(np.mean([getattr(one.reward, name) for one in scored]))

    return Evaluation(
        clips=len(scored),
        j=float(j[visible].mean()),
        f=float(f[visible].mean()),
        jf=float(jf[visible].mean()),
        **{name: mean(name) for name in ("format", "temporal", "spatial", "mask", "turns")},
        best_constant_keyframe=float(best_constant_keyframe(areas)[0]),
        random_visible_keyframe=float(random_visible_keyframe(areas)),
        by_kind={str(kind): float(jf[kinds == kind].mean()) for kind in np.unique(kinds)},
    )


def _thumbnails(
    clip: Clip, masks: np.ndarray, truth: np.ndarray, rollout: Rollout, shown: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """About `count` frames with the predicted and the true mask, the keyframe among them."""
    frames = set(_spread(len(clip.frames), count).tolist())
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
