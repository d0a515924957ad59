"""The whole chain on clips of a source: answers in batches, then a mask for every frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from revseg_jax.chain.parsing import holds_object
from revseg_jax.config import ChainConfig
from revseg_jax.data.clip import Clip
from revseg_jax.data.example import Batch, Example, make_example, stack
from revseg_jax.data.processes import cores
from revseg_jax.data.source import ClipSource
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.rollout.loading import prompts_of
from revseg_jax.rollout.sampling import rollout_keys
from revseg_jax.tracker.client import Prompt, TrackerClient

BATCH = 16  # prompts sampled together
Thing = TypeVar("Thing")


def answers(
    engine: RolloutEngine, params: Any, source: ClipSource, chosen: Sequence[int], chain: ChainConfig, seed: int = 0
) -> Iterator[tuple[list[Clip], Batch, list[Rollout]]]:
    """One chain for each chosen pair of the source. What is drawn depends on the seed and the pair only."""
    params = engine.weights(params)
    with ThreadPoolExecutor(cores()) as pool:

        def begin(start: int) -> tuple[list[Clip], list[Future[Example]]]:
            indices = [int(i) for i in chosen[start : start + BATCH]]
            clips = [source[i] for i in indices]
            return clips, [pool.submit(make_example, clip, i, chain) for clip, i in zip(clips, indices, strict=True)]

        # Frames of the next batch are decoded while this one is answered.
        begun = map(begin, range(0, len(chosen), BATCH))
        coming = next(begun, None)
        while coming is not None:
            (clips, examples), coming = coming, next(begun, None)
            made = [example.result() for example in examples]
            # The last batch is filled up, so that one compiled program serves all.
            batch = stack(made + made[:1] * (BATCH - len(made)))
            _, chains = engine.sample(params, prompts_of(batch), rollout_keys(seed, 0, batch.index, 1))
            yield clips, batch, [row[0] for row in chains[: len(clips)]]


def one_behind(items: Iterator[Thing]) -> Iterator[Thing]:
    """Each item when the next one has come: what was begun for it in threads goes on while that one is made."""
    held: list[Thing] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


def tracker_prompts(clips: list[Clip], batch: Batch, chains: list[Rollout]) -> list[tuple[Clip, Prompt | None]]:
    """What to track in each clip: (keyframe, box) in frames and pixels of the clip; None for a failed chain."""
    return [
        (clip, (int(batch.sampled[b, rollout.turn1.frame_idx]), rollout.box) if rollout.ok else None)
        for b, (clip, rollout) in enumerate(zip(clips, chains, strict=True))
    ]


@contextmanager
def tracking_threads(client: TrackerClient | None) -> Iterator[ThreadPoolExecutor]:
    """Threads to `track` in, two a sidecar. Left by an error or a signal they give up what is queued, and what is under
    way is not waited for."""
    pool = ThreadPoolExecutor(2 * (client.sidecars if client else 1))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def track(client: TrackerClient | None, clip: Clip, prompt: Prompt | None) -> np.ndarray:
    """Masks bool [T, H, W] on every frame of the clip; empty ones without a tracker or for a failed chain."""
    if client is None or prompt is None:
        return np.zeros((len(clip.frames), clip.height, clip.width), bool)
    return client.track(clip.frames, [prompt])[0]


def failure_cause(rollout: Rollout) -> str:
    """Why a chain has no box, in words that can be counted; empty when it has one."""
    if rollout.ok:
        return ""
    turn, answer = (1, rollout.answer1) if rollout.answer2 is None else (2, rollout.answer2)
    reason = rollout.failure.removeprefix(f"turn {turn}: ")
    if reason in ("no object", "no box"):
        if "<answer>" not in answer:
            reason = "no answer tag"
        else:
            reason = "JSON object of another form" if holds_object(answer) else "bad JSON"
    elif reason.startswith("frame_idx is not in"):
        reason = "keyframe out of range"
    return f"turn {turn}: {reason}"
