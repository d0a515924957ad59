"""How each benchmark makes its numbers of the scores of its videos. Percentages; a missing prediction counts 0, but for
Ref-DAVIS17 (a), which takes it for empty masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from revseg_jax.evaluation.benchmarks import Benchmark
from revseg_jax.evaluation.scoring import ExpressionScore, VideoScores


@dataclass(frozen=True)
class Row:
    """A line of the table. `others` are numbers that only this benchmark has."""

    title: str
    j: float | None
    f: float | None
    jf: float | None
    protocol: str
    expressions: int
    missing: int
    others: dict[str, float]


def rows_of(benchmark: Benchmark, videos: Sequence[VideoScores], left_out: str = "") -> list[Row]:
    """left_out: what is missing of the split, in words."""
    rows = PROTOCOLS[benchmark.protocol](benchmark.title, videos)
    return [replace(row, protocol=f"{row.protocol}; {left_out}") for row in rows] if left_out else rows


def _row(title: str, scores: Sequence[ExpressionScore], protocol: str, **others: float) -> Row:
    missing = sum(score.missing for score in scores)
    if not scores:
        return Row(title, None, None, None, protocol, 0, 0, others)
    j, f = (100 * float(np.mean([getattr(score, name) for score in scores])) for name in ("j", "f"))
    return Row(title, j, f, (j + f) / 2, protocol, len(scores), missing, others)


def _all(videos: Sequence[VideoScores]) -> list[ExpressionScore]:
    return [score for video in videos for score in video.expressions]


MEAN = "mean over frames, then over expressions"


def expressions(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    return [_row(title, _all(videos), MEAN)]


def kinds(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    scores = _all(videos)
    of_kinds = {kind: [score for score in scores if score.kind == kind] for kind in sorted({s.kind for s in scores})}
    return [_row(title, scores, MEAN), *(_row(f"{title}: {kind}", of, MEAN) for kind, of in of_kinds.items())]


def davis(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    scores = _all(videos)
    # Over all objects of all videos, by annotator; then over annotators: [annotators, objects, J and F].
    j, f = 100 * np.concatenate([video.annotators for video in videos], axis=1).mean((0, 1))
    missing = sum(score.missing for score in scores)
    merged = "an annotator's objects merged, Hungarian matching, void left out; mean over objects, then 4 annotators"
    merged += "; a missing prediction counts as empty masks" if missing else ""
    return [
        Row(f"{title} (a)", float(j), float(f), float(j + f) / 2, merged, len(scores), missing, {}),
        _row(f"{title} (b)", scores, f"each expression by itself; {MEAN}"),
    ]


def revos(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    """There are two Rs. The official one, of VISA's tools/eval_revos.py, is over the expressions that have objects and
    counts a wrong pixel 255 times, so that few of them make it 0. Beside it stands what R is said to tell, how much is
    segmented where nothing should be: over the expressions about what is not there, with a wrong pixel as one."""

    def mean(name: str, values: Sequence[float]) -> dict[str, float]:
        return {name: 100 * float(np.mean(values))} if values else {}

    scores = _all(videos)
    of = {kind: [s for s in scores if s.kind == kind] for kind in ("referring", "reasoning", "non-existent")}
    rows = [
        _row(f"{title} {kind}", of[kind], MEAN, **mean("official R", [score.official_robustness for score in of[kind]]))
        for kind in ("referring", "reasoning")
    ]
    if all(row.expressions for row in rows):
        j, f = (float(np.mean([getattr(row, name) for row in rows])) for name in ("j", "f"))
        others = {"official R": float(np.mean([row.others["official R"] for row in rows]))}
        others |= mean("R of non-existent objects", [score.robustness for score in of["non-existent"]])
        count, missing = sum(row.expressions for row in rows), sum(row.missing for row in rows)
        note = "unweighted mean of referring and reasoning"
        rows.append(Row(f"{title} overall", j, f, (j + f) / 2, note, count, missing, others))
    return rows


def reason_vos(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    scores = _all(videos)
    there = [score for score in scores if not score.missing]
    return [
        _row(title, scores, f"{MEAN}; a missing prediction counts 0"),
        _row(f"{title}, official script", there, f"{MEAN}; missing predictions are left out, which flatters"),
    ]


def images(title: str, videos: Sequence[VideoScores]) -> list[Row]:
    scores = _all(videos)
    union = sum(score.union for score in scores)
    giou = 100 * float(np.mean([score.j for score in scores]))
    ciou = 100 * (sum(score.intersection for score in scores) / union if union else 1.0)
    missing = sum(score.missing for score in scores)
    note = "gIoU: mean IoU of images; cIoU: all intersections over all unions; ignored regions left out"
    return [Row(title, None, None, None, note, len(scores), missing, {"gIoU": giou, "cIoU": ciou})]


PROTOCOLS: dict[str, Callable[[str, Sequence[VideoScores]], list[Row]]] = {
    "expressions": expressions,
    "kinds": kinds,
    "davis": davis,
    "revos": revos,
    "reason_vos": reason_vos,
    "images": images,
}
