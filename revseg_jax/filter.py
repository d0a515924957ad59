"""`revseg filter`: SAM2 on every frame from the true box; videos where it cannot draw the object are dropped.

The paper's quality filter (arXiv 2512.02835): all queries of a video go when its mean mask IoU is under 0.6.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from revseg_jax.config import Config
from revseg_jax.data.clip import Clip, boxes_and_areas, decode_mask
from revseg_jax.data.filtered import DECISIONS, write_decisions
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError
from revseg_jax.evaluation.metrics import region_similarity
from revseg_jax.paths import local_only, write_whole
from revseg_jax.tracker.client import TrackerClient, description
from revseg_jax.train import tracker_client

SPLIT = "train"
SCORES = "filter_scores.jsonl"  # one line a video, whatever the threshold


def main(folder: str, threshold: float, config: Config) -> dict[str, Any]:
    """Scores the videos of the train split that have no score yet and writes filter.json, the decisions, into `folder`.

    Another threshold decides anew from the scores that are there. Earlier decisions hold until the new ones replace
    them. Raises InputError for a folder that is not prepared, a threshold outside 0..1, or scores of another tracker.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold} is not between 0 and 1")
    path = local_only(folder)
    total = read_prepared(path)["expressions"].get(SPLIT)
    if total is None:
        raise InputError(f"{folder} has no split {SPLIT!r}: only training data is filtered")
    with tracker_client(config) as client:
        tracker = description(client.info())["tracker"]
        scores = _score_all(path, ClipSource([path], SPLIT, with_dropped=True), client, tracker)
    dropped = [video for video, iou in scores.items() if iou < threshold]
    queries = {video: len(ids) for video, ids in total}
    content = {
        "split": SPLIT,
        "threshold": threshold,
        "tracker": tracker,
        "videos": len(scores),
        "queries": sum(queries.values()),
        "dropped_queries": sum(queries[video] for video in dropped),
        "mean_iou": float(np.mean(list(scores.values()))),
        "dropped": dropped,
    }
    write_decisions(path, content)
    print(
        f"dropped {len(dropped):,} of {len(scores):,} videos with {content['dropped_queries']:,} of "
        f"{content['queries']:,} queries: mean IoU under {threshold:g}; see {path / DECISIONS}"
    )
    return content


def _score_all(folder: Path, source: ClipSource, client: TrackerClient, tracker: dict[str, str]) -> dict[str, float]:
    """Mean IoU of every video; what stands in the scores file is not asked again."""
    scores: dict[str, float] = {}
    log = folder / SCORES
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut off when the command was killed
            continue
        if record["tracker"].get("model") != tracker["model"]:
            raise InputError(f"{log} holds scores of the tracker {record['tracker']['checkpoint']}: delete it to go on")
        scores[record["video"]] = record["mean_iou"]
    write_whole(log, "".join(_line(video, iou, tracker) for video, iou in scores.items()))
    groups: dict[str, list[int]] = {}
    for index, (video, _) in enumerate(source.ids()):
        groups.setdefault(video, []).append(index)
    todo = {video: pairs for video, pairs in groups.items() if video not in scores}
    with (
        tqdm(total=len(groups), initial=len(groups) - len(todo), desc="filter", unit="video") as bar,
        open(log, "a") as file,
        ThreadPoolExecutor(4 * client.sidecars) as pool,
    ):
        for video, pairs in todo.items():
            scores[video] = _mean_iou([source[index] for index in pairs], client, pool)
            file.write(_line(video, scores[video], tracker))
            file.flush()
            bar.update()
    return scores


def _line(video: str, iou: float, tracker: dict[str, str]) -> str:
    return json.dumps({"video": video, "mean_iou": iou, "tracker": tracker}) + "\n"


def _mean_iou(clips: list[Clip], client: TrackerClient, pool: ThreadPoolExecutor) -> float:
    """Over all frames and queries of a video in which the target is visible; 1 when none ever is."""
    boxes = [boxes_and_areas(clip.masks, clip.height, clip.width)[0] for clip in clips]

    def of_frame(t: int) -> list[float]:
        seen = [(clip.masks[t], tuple(box[t].tolist())) for clip, box in zip(clips, boxes, strict=True)]
        seen = [(rle, box) for rle, box in seen if rle is not None]
        if not seen:
            return []
        size = clips[0].height, clips[0].width
        masks = client.track([clips[0].frames[t]], [(0, box) for _, box in seen])[:, 0]
        truth = np.stack([decode_mask(rle, *size) for rle, _ in seen])
        return region_similarity(masks, truth).tolist()

    found = [iou for frame in pool.map(of_frame, range(len(clips[0].frames))) for iou in frame]
    return float(np.mean(found)) if found else 1.0
