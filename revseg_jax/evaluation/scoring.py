"""Predictions on disk against a prepared split: J, F and what else a benchmark needs; videos in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from revseg_jax.data.clip import decode_mask
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.processes import cores, process_pool
from revseg_jax.data.records import FOREGROUND, VOID, VideoTruth
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError
from revseg_jax.evaluation.benchmarks import Benchmark
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.evaluation.predictions import prediction_folder, predictions_root, read_prediction

ANNOTATORS = 4  # of Ref-DAVIS17


@dataclass(frozen=True)
class ExpressionScore:
    """j, f: means over the frames, in [0, 1]; 0 when there is no prediction. robustness, official_robustness: R of
    ReVOS as `_robustness` has it. intersection, union: pixels of all frames."""

    video: str
    expression: str
    kind: str
    missing: bool
    j: float
    f: float
    robustness: float
    official_robustness: float
    intersection: int
    union: int


@dataclass(frozen=True)
class VideoScores:
    """`annotators`, for Ref-DAVIS17: J and F of each annotator's objects, as float64 [4, objects, 2]."""

    expressions: list[ExpressionScore]
    annotators: np.ndarray | None


def score_benchmark(
    benchmark: Benchmark, data: Path, predictions: Path, workers: int = 0, progress: bool = True
) -> list[VideoScores]:
    """Scores of all videos, in their order. workers: processes, 0 takes all cores.

    Raises InputError when the split has no public truth or the folder of predictions does not fit it.
    """
    if not read_prepared(data)["truth"][benchmark.split]:
        raise InputError(f"the truth of {benchmark.title} is not public: its server scores the zip of --submission")
    source = ClipSource([data], benchmark.split)
    root = predictions_root(predictions, source.ids())
    one = partial(_score_number, str(data), benchmark, root)
    workers = min(workers or cores(), source.videos)
    found: list[VideoScores] = []
    with tqdm(total=source.videos, desc=f"score {benchmark.name}", unit="video", disable=not progress or None) as bar:
        jf: list[float] = []

        def take(scores: VideoScores) -> None:
            found.append(scores)
            jf.extend((e.j + e.f) / 2 for e in scores.expressions)
            bar.update()
            bar.set_postfix({"J&F": f"{100 * np.mean(jf):.1f}"} if jf else {})

        if workers == 1:
            for number in range(source.videos):
                take(one(number))
        else:
            with process_pool(workers) as pool:
                for scores in pool.map(one, range(source.videos)):
                    take(scores)
    return found


_sources: dict[tuple[str, str], ClipSource] = {}  # of this process: files are opened once


def _score_number(data: str, benchmark: Benchmark, root: Path, number: int) -> VideoScores:
    key = data, benchmark.split
    if key not in _sources:
        _sources[key] = ClipSource([data], benchmark.split)
    return score_video(_sources[key].video(number), benchmark, root)


def score_video(truth: VideoTruth, benchmark: Benchmark, root: Path) -> VideoScores:
    """The scores of one video's predictions. One of them is in memory at a time, and one object that it is scored
    against, but for Ref-DAVIS17, which merges them."""
    size = truth.height, truth.width

    def decoded(name: str) -> np.ndarray:
        return np.stack([decode_mask(rle, *size) for rle in truth.objects[name]])

    void, foreground = (decoded(name) if name in truth.objects else None for name in (VOID, FOREGROUND))
    order = list(truth.objects)
    merged = benchmark.protocol == "davis"
    scores, predicted = [], []
    for expression in truth.expressions[: 1 if benchmark.first_expression else None]:
        mask = read_prediction(prediction_folder(root, truth.video_id, expression.id), truth.frame_names, *size)
        covered = np.zeros((len(truth.frame_names), *size), np.uint8)  # by how many of its objects
        for position in expression.objects:
            covered += decoded(order[position])
        wanted = covered > 0
        names = truth.video_id, expression.id, expression.kind
        if benchmark.protocol == "images" and void is not None:
            wanted &= ~void
            mask = None if mask is None else mask & ~void
        if merged:
            predicted.append(np.zeros_like(wanted) if mask is None else mask)
        if mask is None:
            scores.append(ExpressionScore(*names, True, 0.0, 0.0, 0.0, 0.0, 0, int(wanted.sum())))
            continue
        robust = (0.0, 0.0)
        if foreground is not None:
            robust = _robustness(mask, covered, foreground)
        scores.append(
            ExpressionScore(
                *names,
                False,
                float(region_similarity(mask, wanted).mean()),
                float(contour_accuracy(mask, wanted).mean()),
                *robust,
                int(np.count_nonzero(mask & wanted)),
                int(np.count_nonzero(mask | wanted)),
            )
        )
    annotators = None
    if merged:
        objects = [decoded(name) for name in order if name not in (VOID, FOREGROUND)]
        annotators = _annotators(truth, objects, order, predicted, void)
    return VideoScores(scores, annotators)


def _robustness(mask: np.ndarray, covered: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """Two readings of ReVOS's R, the mean over frames of max(0, 1 - wrong pixels / pixels of any object).

    First with a wrong pixel as one pixel. Then as VISA's tools/eval_revos.py computes it from images of 0 and 255, such
    as VISA writes: it sums bytes, (1 - objects that cover the pixel) * 255, so that a wrong pixel counts 255, and one
    that k > 1 of the expression's objects cover, which is right, k - 1.
    """
    predicted = [of_frame[shown] for of_frame, shown in zip(covered, mask, strict=True)]
    wrong = np.array([np.count_nonzero(values == 0) for values in predicted])
    again = np.array([np.sum(values[values > 1] - 1) for values in predicted])
    total = np.array([np.count_nonzero(of_frame) for of_frame in foreground]) + 1e-6
    plain, official = (float(np.maximum(1 - pixels / total, 0).mean()) for pixels in (wrong, 255 * wrong + again))
    return plain, official


def _annotators(
    truth: VideoTruth,
    objects: Sequence[np.ndarray],
    order: Sequence[str],
    predicted: Sequence[np.ndarray],
    void: np.ndarray | None,
) -> np.ndarray:
    """Each annotator's expressions as one segmentation, scored like an unsupervised one of DAVIS 2017.

    Where masks overlap the first object wins: the argmax over 0.1 for the background and each binary mask. Objects and
    segments are matched by the assignment with the highest mean J&F; empty segments stand in for
    objects that no expression names.
    """
    count = len(truth.expressions) // ANNOTATORS
    targets = [[order[o] for o in expression.objects] for expression in truth.expressions]
    by_object = [targets[ANNOTATORS * k : ANNOTATORS * (k + 1)] for k in range(count)]
    if ANNOTATORS * count != len(targets) or any(group != group[:1] * ANNOTATORS for group in by_object):
        raise InputError(f"video {truth.video_id}: the expressions are not those of {ANNOTATORS} annotators an object")
    seen = np.ones_like(objects[0]) if void is None else ~void
    scores = np.zeros((ANNOTATORS, len(objects), 2))
    for annotator in range(ANNOTATORS):
        free, segments = seen.copy(), []
        for k in range(count):
            segments.append(predicted[ANNOTATORS * k + annotator] & free)
            free &= ~segments[-1]
        segments += [np.zeros_like(free)] * (len(objects) - count)
        pairs = np.array(  # [segments, objects, 2]
            [
                [
                    (region_similarity(segment, target & seen).mean(), contour_accuracy(segment, target & seen).mean())
                    for target in objects
                ]
                for segment in segments
            ]
        )
        rows, columns = linear_sum_assignment(-pairs.mean(-1))
        scores[annotator, columns] = pairs[rows, columns]
    return scores
