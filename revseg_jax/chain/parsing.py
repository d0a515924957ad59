"""Reads the policy's two answers. Any text gives a success or a failure; nothing here raises.

Success is tolerant and asks only for a usable content: a keyframe among the frames shown and a description (turn 1), a
box (turn 2). It is looked for inside <answer>, else behind </think>, else everywhere when there are no thoughts, as
JSON or as what models write in its place: single quotes, a bare object or a list, code fences, text behind the value.

The format score is strict and grades how well the answer follows the rules. How the paper splits it is not known; here
it is the mean of equal parts, each in [0, 1]:

    turn 1  think   exactly one <think>...</think> pair, not empty
            answer  exactly one <answer>...</answer> pair, behind the thoughts
            clean   nothing outside the two pairs
            json    the answer is JSON, a list holding one object (half when only the tolerant reader gets there)
            keys    half for `frame_idx`, an integer among the frames shown; half for `object description`, a text
    turn 2  answer, clean (thoughts before the answer are allowed, not asked for), json
            box     four finite numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2

A chain of one turn answers with keyframe and box at once. It is read as both halves of a chain of two, each graded as
that turn is, but for the description, which it need not give: keys is `frame_idx` alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from revseg_jax.chain.geometry import Box
from revseg_jax.chain.literal import read_value

FRAME_KEY = "frame_idx"
DESCRIPTION_KEY = "object description"
BOX_KEYS = ("bbox_2d", "bbox", "box")  # the first is what Qwen2.5-VL writes and what the prompt asks for
MAX_STARTS = 16  # brackets tried as the beginning of a value; the bound keeps hostile text linear in time
_BRACKET = re.compile(r"[\[{]")

T = TypeVar("T")


@dataclass(frozen=True)
class Turn1:
    """The first answer.

    Attributes:
        ok: whether a keyframe and, in a chain of two turns, a description were found (S1).
        frame_idx: index into the frames shown, 0-based; None unless ok.
        description: the object's look in the keyframe; "" unless ok, and it may be in a chain of one turn.
        format_score: in [0, 1].
        reason: why it failed, in a few words; "" when ok.
    """

    ok: bool
    frame_idx: int | None
    description: str
    format_score: float
    reason: str


@dataclass(frozen=True)
class Turn2:
    """The second answer.

    Attributes:
        ok: whether a box was found (S2).
        box: x1, y1, x2, y2 as the policy wrote them: pixels of the keyframe, square as it was shown; None unless ok.
        format_score: in [0, 1].
        reason: why it failed, in a few words; "" when ok.
        in_first: it is the second half of the first answer, in a chain of one turn.
    """

    ok: bool
    box: Box | None
    format_score: float
    reason: str
    in_first: bool = False


def parse_turn1(text: str, frames: int) -> Turn1:
    """Keyframe and description of the first answer; `frames` is the number of frames that were shown."""
    layout = _layout(text)
    item, json_credit = _first(layout.content, _keyframe_object)
    if item is None:
        return Turn1(False, None, "", _mean(layout.think, layout.answer, layout.clean_with_think, 0, 0), "no object")
    frame_idx, exact, reason = _keyframe(item, frames)
    description = _description(item.get(DESCRIPTION_KEY))
    score = _mean(layout.think, layout.answer, layout.clean_with_think, json_credit, _mean(exact, bool(description)))
    if frame_idx is not None and description:
        return Turn1(True, frame_idx, description, score, "")
    return Turn1(False, None, "", score, reason or f"no text under {DESCRIPTION_KEY!r}")


def parse_turn2(text: str) -> Turn2:
    """The box of the second answer, in pixels of the keyframe as it was shown."""
    layout = _layout(text)
    return _turn2(layout, *_first(layout.content, _four_values))


def parse_one_turn(text: str, frames: int) -> tuple[Turn1, Turn2 | None]:
    """Both halves of the only answer of a chain of one turn; None for the second when there is no keyframe."""
    layout = _layout(text)
    item, json_credit = _first(layout.content, _keyframe_object)
    frame_idx, exact, reason = (None, False, "no object") if item is None else _keyframe(item, frames)
    score = _mean(layout.think, layout.answer, layout.clean_with_think, json_credit, exact)
    if frame_idx is None:
        return Turn1(False, None, "", score, reason), None
    turn1 = Turn1(True, frame_idx, _description(item.get(DESCRIPTION_KEY)), score, "")
    return turn1, replace(_turn2(layout, _four_values(item), json_credit), in_first=True)


def holds_object(text: str) -> bool:
    """Whether an answer has an object, or a list that begins with one, in its place, whatever its keys are."""
    found = (value[0] if isinstance(value, list) and value else value for value, _ in _values(_layout(text).content))
    return any(isinstance(value, dict) for value in found)


@dataclass(frozen=True)
class _Layout:
    think: bool  # exactly one pair, not empty
    answer: bool  # exactly one pair
    clean: bool  # nothing but the answer and, at most, one think pair
    content: str  # where to look for the value

    @property
    def clean_with_think(self) -> bool:
        return self.clean and self.think


def _layout(text: str) -> _Layout:
    for end in ("<|im_end|>", "<|endoftext|>"):  # the sampler's own end and padding
        text = text.partition(end)[0]
    think, answer = (text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in ("think", "answer"))
    head, closed, behind = text.partition("</think>")
    before, _, thought = head.partition("<think>")
    if not closed or ("<answer>" not in behind and "<answer>" in head):
        before, thought, behind = "", "", text
    between, answered, content = behind.partition("<answer>")
    content, finished, after = content.partition("</answer>")
    if not answered:  # an answer without its tags; but what stands in unfinished thoughts is no answer
        content = "" if "<think>" in behind else behind
    answer = answer and bool(answered and finished)
    clean = answer and not (before + between + after).strip()
    return _Layout(think and bool(thought.strip()), answer, clean, content)


def _first(content: str, find: Callable[[object], T | None]) -> tuple[T | None, float]:
    """What `find` makes of the first value in the text that it knows, and the format's credit for the JSON."""
    for value, exact in _values(content):
        found = find(value)
        if found is not None:
            one_object = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
            return found, 1.0 if exact and one_object else 0.5
    return None, 0.0


def _values(content: str) -> Iterator[tuple[object, bool]]:
    """Values found in the text, best first, and whether the whole text was JSON."""
    try:
        yield json.loads(content, parse_constant=_refuse), True
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        pass
    for start in islice(_BRACKET.finditer(content), MAX_STARTS):
        try:
            yield read_value(content, start.start()), False
        except ValueError:
            continue


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _keyframe_object(value: object) -> dict | None:
    item = value[0] if isinstance(value, list) and value else value
    return item if isinstance(item, dict) and (FRAME_KEY in item or DESCRIPTION_KEY in item) else None


def _description(value: object) -> str:
    """The text without lone surrogates, which can neither be tokenised nor written to a file."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip() if isinstance(value, str) else ""


def _keyframe(item: dict, frames: int) -> tuple[int | None, bool, str]:
    """The keyframe when it is among the frames shown, whether it was written as an integer, and else what is wrong."""
    raw = item.get(FRAME_KEY)
    index = _index(raw)
    if index is None:
        return None, False, f"no integer under {FRAME_KEY!r}"
    if not 0 <= index < frames:
        return None, False, f"{FRAME_KEY} is not in 0..{frames - 1}"
    return index, isinstance(raw, int), ""


def _index(value: object) -> int | None:
    if isinstance(value, str) and len(value) < 10 and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _four_values(value: object) -> list | None:
    """What stands in the place of the box: four values, bare or under a box key, or the first of a list of these."""
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in BOX_KEYS if key in value), None)
    return value if isinstance(value, list) and len(value) == 4 else None


def _box(values: list) -> Box | None:
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return None
    try:
        x1, y1, x2, y2 = map(float, values)
    except OverflowError:  # an integer beyond the range of float
        return None
    finite = all(map(math.isfinite, (x1, y1, x2, y2)))
    return (x1, y1, x2, y2) if finite and x1 < x2 and y1 < y2 else None


def _turn2(layout: _Layout, numbers: list | None, json_credit: float) -> Turn2:
    """From the four values that stand in the place of the box, if any do."""
    box = _box(numbers) if numbers is not None else None
    reason = "no box" if numbers is None else "not x1 < x2 and y1 < y2 in finite numbers"
    score = _mean(layout.answer, layout.clean, json_credit, box is not None)
    return Turn2(box is not None, box, score, "" if box else reason)


def _mean(*parts: float) -> float:
    return sum(parts) / len(parts)
