"""The reader of answers, on JSON and Python literals and on any text at all."""

from __future__ import annotations

import json
import random
import time
from dataclasses import fields

import pytest
from answers import good1, good2
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg_jax.chain.geometry import box_to_original
from revseg_jax.chain.literal import read_value
from revseg_jax.chain.parsing import parse_one_turn, parse_turn1, parse_turn2

# ---------------------------------------------------------------- the tolerant reader

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inner), default=0)


def quotes_are_clear(value: object) -> bool:
    """Whether no string holds a quote that a reader may take for its end."""
    if isinstance(value, dict):
        return all(quotes_are_clear(k) and quotes_are_clear(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(quotes_are_clear, value))
    return not isinstance(value, str) or not set(value) & set("\"'\\")


@given(JSON_VALUES)
@settings(max_examples=150, deadline=None)
def test_reader_agrees_with_json_and_python(value: object) -> None:
    if depth(value) > 8:
        return
    assert read_value(json.dumps([value], ensure_ascii=False) + " and more") == [value]
    if quotes_are_clear(value) and "\\" not in repr(value):
        assert read_value(f"see: {[value]!r}", 5) == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': 'the dog's ear', 'b': 1}", {"a": "the dog's ear", "b": 1}),
        ('["a "big" dog"]', ['a "big" dog']),
        (r"""['it\'s', "say \"no\"", 'tab\t\u00e9 \d']""", ["it's", 'say "no"', "tab\té d"]),
        ("[True, false, None, null, -1.5e2, .5, +3, 2.,]", [True, False, None, None, -150.0, 0.5, 3, 2.0]),
        ("{'a' : [ ] , 'b':{ } , }", {"a": [], "b": {}}),
        ("['two\nlines']", ["two\nlines"]),
    ],
)
def test_reader_by_hand(text: str, value: object) -> None:
    assert read_value(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "[", "[1", "[1 2]", "{1: 2}", "{'a' 1}", "{'a': }", "[nan]", '["a', "[" * 10 + "]" * 10]
)
def test_reader_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        read_value(text)


# ---------------------------------------------------------------- any text at all

TOKENS = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<|im_end|>",
        "```json",
        "```",
        "\\",
        "\\u",
        "\\ud800",
        "NaN",
        "-Infinity",
    ),
    *("[", "]", "{", "}", '"', "'", ",", ":", " ", "\n", "1e999", "-0", "9" * 30, "true", "None", "bbox_2d", "box"),
    *(
        '"frame_idx": 3',
        '"object description": "x"',
        '"bbox_2d": [1, 2, 3, 4]',
        good1(),
        good2(),
        "\ud800",
        "\x00",
        "٣",
        "🦊",
    ),
]
CUT = st.tuples(st.integers(0, 120), st.integers(0, 12), st.sampled_from(TOKENS))
MUTATED = st.builds(
    lambda text, cuts: [text := text[:at] + new + text[at + length :] for at, length, new in [(0, 0, ""), *cuts]][-1],
    st.sampled_from([good1(), good2(), good1().replace('"', "'"), good2("[1.5, 2, 3e1, 4]")]),
    st.lists(CUT, max_size=3),
)
ANY_TEXT = st.one_of(MUTATED, st.lists(st.sampled_from(TOKENS), max_size=8).map("".join), st.text())


@given(ANY_TEXT, st.integers(1, 32))
@settings(max_examples=10_000, deadline=None)
def test_no_text_raises(text: str, frames: int) -> None:
    check_parses(text, frames)


def check_parses(text: str, frames: int) -> None:
    """All parsers give well-formed results for this text."""
    turn1, turn2 = parse_turn1(text, frames), parse_turn2(text)
    for turn in (turn1, turn2, *filter(None, parse_one_turn(text, frames))):
        assert 0 <= turn.format_score <= 1 and bool(turn.reason) != turn.ok
        assert all(value is not None for value in (getattr(turn, f.name) for f in fields(turn))) or not turn.ok
    if turn1.ok:
        assert 0 <= turn1.frame_idx < frames and turn1.description.strip()
        turn1.description.encode()
    if turn2.ok:
        x1, y1, x2, y2 = turn2.box
        assert abs(x1) + abs(y1) + abs(x2) + abs(y2) >= 0 and x1 < x2 and y1 < y2  # NaN fails all comparisons
        box_to_original(turn2.box, 840, 480, 854)


def hostile_texts(size: int) -> list[str]:
    """Texts of about `size` characters that make careless parsers recurse, backtrack or rescan."""
    rng = random.Random(0)
    units = [
        "[",
        "{",
        '{"a":',
        "[{",
        '"',
        "'",
        '["',
        "\\",
        "{'",
        "<think>",
        "</think>",
        "<answer>",
        "<answer>[",
        "<|im_end|>",
    ]
    units += [
        " ",
        "\n",
        "9",
        "1,",
        "[1,",
        "' ",
        '" ',
        "' x",
        "1e",
        "-",
        ".",
        "```",
        "[9" + "9" * 50 + ",",
        "\\u12",
        "((",
        "é",
    ]
    bodies = [unit * (size // len(unit)) for unit in units]
    bodies += ["".join(rng.choice(TOKENS) for _ in range(size // 6)), "[" * (size // 2) + "]" * (size // 2)]
    bodies += ['{"a":' * (size // 6) + "1" + "}" * (size // 6), '{"frame_idx": "' + "'" * size, "[" + "9" * size + "]"]
    return [wrap.format(body) for body in bodies for wrap in ("{}", "<think>t</think><answer>{}</answer>")]


def test_long_hostile_texts_take_linear_time() -> None:
    for text in hostile_texts(100_000):
        started = time.process_time()
        check_parses(text, 16)
        taken = time.process_time() - started
        assert taken < 5, f"{taken:.1f} s for {text[:60]!r}..."  # a quadratic scan takes minutes
