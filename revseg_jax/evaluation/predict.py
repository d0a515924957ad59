"""A policy's predictions on a prepared split, expression by expression; it goes on where it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from revseg_jax.data.clip import Clip, decode_mask
from revseg_jax.data.example import Batch
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.benchmarks import Benchmark
from revseg_jax.evaluation.chains import answers, failure_cause, one_behind, track, tracker_prompts, tracking_threads
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.evaluation.predictions import clear_partial, prediction_folder, write_prediction
from revseg_jax.paths import write_whole
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.tracker.client import Prompt, TrackerClient

CHAINS = "chains.jsonl"  # one line a chain: what was said, and why it failed
PREDICTIONS = "predictions"


def predict(
    benchmark: Benchmark,
    data: Path,
    folder: Path,
    engine: RolloutEngine,
    params: Any,
    client: TrackerClient,
    seed: int = 0,
) -> Counter[str]:
    """Writes `folder`/predictions and `folder`/chains.jsonl; returns how many chains failed of which cause.

    A failed chain gets all-zero masks. What a stopped run left is kept. Where the truth is public, the progress bar
    shows the mean J&F of the expressions so far whose target is anywhere visible; the benchmark's own numbers are made
    from the files, later.
    """
    source = ClipSource([data], benchmark.split)
    truth = read_prepared(data)["truth"][benchmark.split]
    root = folder / PREDICTIONS
    root.mkdir(parents=True, exist_ok=True)
    clear_partial(root)
    records = _finished(folder / CHAINS, root)
    ids = source.ids()
    wanted = range(len(ids))
    if benchmark.first_expression:
        wanted = [i for i in wanted if i == 0 or ids[i][0] != ids[i - 1][0]]
    todo = [i for i in wanted if ids[i] not in records]
    write_whole(folder / CHAINS, "".join(json.dumps(record) + "\n" for record in records.values()))
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=f"predict {benchmark.name}", unit="chain")
    with bar, open(folder / CHAINS, "a") as log, tracking_threads(client) as pool:

        def begin(clips: list[Clip], batch: Batch, chains: list[Rollout]) -> Iterator:
            prompts = tracker_prompts(clips, batch, chains)
            return zip(prompts, chains, pool.map(partial(_track_and_write, client, root, truth), prompts), strict=True)

        answered = answers(engine, params, source, todo, engine.encoder.chain, seed)
        for begun in one_behind(starmap(begin, answered)):
            for (clip, prompt), rollout, jf in begun:
                record = {
                    "video": clip.video_id,
                    "expression": clip.expression_id,
                    "query": clip.query,
                    "answer1": rollout.answer1,
                    "answer2": rollout.answer2,
                    "keyframe": prompt[0] if prompt else None,
                    "box": list(prompt[1]) if prompt else None,
                    "failure": failure_cause(rollout),
                    "jf": jf,
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
                records[clip.video_id, clip.expression_id] = record
                bar.update()
                if known := [record["jf"] for record in records.values() if record["jf"] is not None]:
                    bar.set_postfix({"J&F": f"{100 * np.mean(known):.1f}"})
    return Counter(record["failure"] for record in records.values() if record["failure"])


def _track_and_write(client: TrackerClient, root: Path, truth: bool, what: tuple[Clip, Prompt | None]) -> float | None:
    """The J&F of the written masks; None without truth, or without anything to find."""
    clip, prompt = what
    masks = track(client, clip, prompt)
    write_prediction(prediction_folder(root, clip.video_id, clip.expression_id), clip.frame_names, masks)
    if not truth or not any(clip.masks):
        return None
    target = np.stack([decode_mask(rle, clip.height, clip.width) for rle in clip.masks])
    return float((region_similarity(masks, target).mean() + contour_accuracy(masks, target).mean()) / 2)


def _finished(log: Path, root: Path) -> dict[tuple[str, str], dict]:
    """The chains whose masks and whose line are there. A line that was cut off counts as none."""
    records = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if prediction_folder(root, record["video"], record["expression"]).is_dir():
            records[record["video"], record["expression"]] = record
    return records
