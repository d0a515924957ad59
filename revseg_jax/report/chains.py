"""Chains one can read: which of the held-out ones to show, and what the page needs of each."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from revseg_jax.report.overlays import Picture, picture
from revseg_jax.report.results import number
from revseg_jax.report.run_files import Record, RunFiles

BEST, TYPICAL, FAILING, WORSE = 2, 2, 2, 1  # clips shown of each sort
CHANGES, TIMES = 3, 6  # chains shown at several evaluations, and at how many
FAILING_BELOW, WORSE_BY = 0.5, 0.1  # in J&F, 0-1
LONGEST_TEXT = 4000  # characters of a prompt or an answer
TAGS = re.compile(r"(</?(?:think|answer)>)")
PADS = re.compile(r"(<\|(?:video|image)_pad\|>)(?:\1)+")


@dataclass(frozen=True)
class Side:
    """One policy's chain on a clip. `texts` are (kind, text) pieces, kind being tag, think, answer or plain."""

    label: str  # base | trained
    record: Record
    jf: float | None  # 0-100; None when the clip was not tracked
    turns: list[list[tuple[str, str]]]
    prompts: list[str]
    rewards: list[tuple[str, float]]
    pictures: list[Picture]
    keyframe: Picture | None  # the one of `pictures` that shows the keyframe
    box: tuple[float, float, float, float] | None  # x, y, width, height in the keyframe picture's pixels


@dataclass(frozen=True)
class Shown:
    """A clip in the report. `why` says what it is an example of; `frames` are its pictures, each frame once."""

    why: str
    record: Record  # of either chain, for what they share
    sides: list[Side]
    frames: list[Picture]


@dataclass(frozen=True)
class Overview:
    """All held-out chains in numbers. `failures` is (label, number of failed chains, [(reason, times)])."""

    clips: int
    better: int
    worse: int
    failures: list[tuple[str, int, list[tuple[str, int]]]]


Pair = dict[str, Record]  # the records of one (clip, query) by label: base, trained or both


def pairs_of(run: RunFiles) -> list[Pair]:
    pairs: dict[tuple, Pair] = {}
    for label, records in (("base", run.base), ("trained", run.trained)):
        for record in records:
            pairs.setdefault((record.get("video_id"), record.get("expression_id")), {}).setdefault(label, record)
    return list(pairs.values())


def overview(pairs: list[Pair]) -> Overview:
    """Better and worse: by more than a point of J&F."""
    changes = [_score(pair["trained"]) - _score(pair["base"]) for pair in pairs if len(pair) == 2]
    failures = []
    for label in ("base", "trained"):
        reasons = Counter(pair[label].get("failure") or "" for pair in pairs if label in pair)
        if reasons:
            del reasons[""]
            failures.append((label, reasons.total(), reasons.most_common(4)))
    return Overview(len(pairs), sum(c > 0.01 for c in changes), sum(c < -0.01 for c in changes), failures)


def chosen(pairs: list[Pair]) -> list[tuple[str, Pair]]:
    """Examples and what they are examples of: the biggest gains, typical clips, failing ones, losses.

    Typical ones are those whose gain is nearest to the median of all pairs. Only clips with pictures are shown, unless
    there is none. With chains of a single policy: its best, typical and worst.
    """
    both = [pair for pair in pairs if len(pair) == 2]
    pool = both or pairs

    def gain(pair: Pair) -> float:
        return _score(pair["trained"]) - _score(pair["base"]) if both else _score(next(iter(pair.values())))

    def best_of(pair: Pair) -> float:
        return max(_score(side) for side in pair.values())

    if not pool:
        return []
    middle = float(np.median([gain(pair) for pair in pool]))
    left = [pair for pair in pool if any(side.get("thumbs") for side in pair.values())] or list(pool)
    result = []

    def take(count: int, why: str, order, condition) -> None:
        for pair in sorted(filter(condition, left), key=order)[:count]:
            left.remove(pair)
            result.append((why, pair))

    best, typical, failing = (
        ("Biggest improvement", "Typical", "Still failing") if both else ("Among the best", "Typical", "Failing")
    )
    take(BEST, best, lambda pair: -gain(pair), lambda pair: gain(pair) > 0)
    take(FAILING, failing, best_of, lambda pair: best_of(pair) < FAILING_BELOW)
    take(WORSE if both else 0, "Got worse", gain, lambda pair: gain(pair) < -WORSE_BY)
    take(TYPICAL, typical, lambda pair: abs(gain(pair) - middle), lambda pair: True)
    order = [best, typical, failing, "Got worse"]
    return sorted(result, key=lambda entry: order.index(entry[0]))


def shown(why: str, pair: Pair) -> Shown:
    """Raises InputError when a picture of the pair cannot be decoded."""
    sides = [_side(label, record) for label, record in pair.items()]
    frames = {p.t: p for side in sides for p in side.pictures}
    return Shown(why, next(iter(pair.values())), sides, list(frames.values()))


def _side(label: str, record: Record) -> Side:
    rewards = record.get("reward") or {}
    pictures = [picture(thumb) for thumb in record.get("thumbs") or []]
    keyframe = next((p for p in pictures if p.t == record.get("frame")), None)
    answers = [record.get("answer1"), record.get("answer2")]
    prompts = [record.get("prompt1"), record.get("prompt2")]
    return Side(
        label=label,
        record=record,
        jf=100 * _score(record) if number(record.get("j")) is not None else None,
        turns=[pieces(text) for text in answers if text is not None],
        prompts=[_shortened(PADS.sub(_count_pads, text)) for text in prompts if text is not None],
        rewards=[(name, value) for name in ("format", "temporal", "spatial", "mask", "total")
                 if (value := number(rewards.get(name))) is not None],
        pictures=pictures,
        keyframe=keyframe,
        box=_box(record, keyframe) if keyframe else None,
    )  # fmt: skip


def _box(record: Record, keyframe: Picture) -> tuple[float, float, float, float] | None:
    """From x1, y1, x2, y2 in original pixels."""
    if not record.get("box") or not record.get("size"):
        return None
    (x1, y1, x2, y2), (height, width) = map(float, record["box"]), map(float, record["size"])
    across, down = keyframe.width / width, keyframe.height / height
    return x1 * across, y1 * down, (x2 - x1) * across, (y2 - y1) * down


def _score(record: Record) -> float:
    """J&F of a chain, 0-1; 0 where there is none."""
    return ((number(record.get("j")) or 0.0) + (number(record.get("f")) or 0.0)) / 2


def pieces(text: str) -> list[tuple[str, str]]:
    """An answer cut at its tags, as it was written: nothing is repaired or left out but what is very long."""
    kind, result = "plain", []
    for part in TAGS.split(_shortened(text)):
        if TAGS.fullmatch(part):
            kind = {"<think>": "think", "<answer>": "answer"}.get(part, "plain")
            result.append(("tag", part))
        elif part:
            result.append((kind, part))
    return result


def _shortened(text: str) -> str:
    cut = len(text) - LONGEST_TEXT
    return text if cut <= 0 else f"{text[:LONGEST_TEXT]} … ({cut} more characters)"


def _count_pads(match: re.Match) -> str:
    return f"{match[1]}×{len(match[0]) // len(match[1])}"


@dataclass(frozen=True)
class Change:
    """One held-out chain at the evaluations of a run: (step, J&F 0-100 or None, its turns, its record) each."""

    record: Record
    times: list[tuple[int, float | None, list[list[tuple[str, str]]], Record]]


def changes(evaluated: list[tuple[int, list[Record]]]) -> list[Change]:
    """The chains whose J&F changed most, at up to TIMES evaluations, the first and the last among them."""
    if len(evaluated) < 2:
        return []
    kept = [evaluated[n] for n in np.unique(np.linspace(0, len(evaluated) - 1, TIMES).round().astype(int))]
    chains: dict[tuple, list[tuple[int, Record]]] = {}
    for step, records in kept:
        for record in records:
            chains.setdefault((record.get("video_id"), record.get("expression_id")), []).append((step, record))

    def spread(chain: list[tuple[int, Record]]) -> float:
        return float(np.std([_score(record) for _, record in chain]))

    most = sorted(chains.values(), key=spread, reverse=True)[:CHANGES]
    return [
        Change(chain[0][1], [(step, (side := _side("", record)).jf, side.turns, record) for step, record in chain])
        for chain in most
    ]


def group_of(records: list[Record]) -> list[Record]:
    """The rollouts of one prompt of a training step: the group whose total rewards differ most."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("video_id"), record.get("expression_id")), []).append(record)

    def spread(group: list[Record]) -> float:
        return float(np.std([total(record) for record in group]))

    return sorted(max(groups.values(), key=spread), key=total, reverse=True)


def total(record: dict[str, Any]) -> float:
    return number((record.get("reward") or {}).get("total")) or 0.0
