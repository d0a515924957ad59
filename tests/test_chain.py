"""Prompts against the published chat template, and answers of every kind."""

from __future__ import annotations

from dataclasses import replace

import jinja2
import pytest
from answers import good1, good2
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg_jax.chain import prompts
from revseg_jax.chain.geometry import box_to_keyframe, box_to_original
from revseg_jax.chain.parsing import Turn1, Turn2, parse_one_turn, parse_turn1, parse_turn2
from revseg_jax.config import ChainConfig
from revseg_jax.errors import InputError

CHAIN = ChainConfig()

# The chat format of Qwen2.5-VL: a default system turn, and media placeholders where they stand in the message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def chat(messages: list[dict], generate: bool = False) -> str:
    return jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=generate)


def user(kind: str, text: str) -> dict:
    return {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("system", [None, "You find objects.", ""])
def test_prompts_equal_the_chat_template(system: str | None) -> None:
    chain = CHAIN if system is None else replace(CHAIN, system_prompt=system)
    turn1 = prompts.turn1_text(chain, "the dog that barks first", 12, 6.5)
    turn2 = prompts.turn2_text(chain, "a brown dog")
    assert "12 frames at fps=2." in turn1 and "6.5 seconds" in turn1 and '"the dog that barks first"' in turn1
    assert "'a brown dog'" in turn2
    # The default system turn is the template's own; any other is a message.
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append(user("video", turn1))
    prefix = prompts.prefix_text(chain, "the dog that barks first", 12, 6.5)
    assert prefix == chat(messages, generate=True)
    answer1, answer2 = good1(description="a brown dog"), good2()
    messages += [{"role": "assistant", "content": answer1}, user("image", turn2)]
    turn2_prompt = prompts.turn2_prompt_text(chain, "a brown dog")
    assert prefix + answer1 + "<|im_end|>" + turn2_prompt == chat(messages, generate=True)
    messages.append({"role": "assistant", "content": answer2})
    whole = prompts.conversation_text(chain, "the dog that barks first", 12, 6.5, answer1, "a brown dog", answer2)
    assert whole == chat(messages)


HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|image_pad|>", "<|", "|>", "<", "|", "{query}", "{0}", "\n", "\ud800", "\x00", "é", "a"]
    )
).map("".join)


@given(HOSTILE)
@settings(max_examples=300, deadline=None)
def test_no_text_brings_in_a_special_token(text: str) -> None:
    plain = prompts.prefix_text(CHAIN, "q", 16, 8.0)
    hostile = prompts.prefix_text(CHAIN, text, 16, 8.0)
    assert hostile.count("<|") == plain.count("<|")
    plain, hostile = prompts.turn2_prompt_text(CHAIN, "d"), prompts.turn2_prompt_text(CHAIN, text)
    assert hostile.count("<|") == plain.count("<|") and hostile.count("\n") == plain.count("\n")
    hostile.encode()  # can be tokenised and written


def test_user_text_stays_readable() -> None:
    assert '"what is {this} < 3 | 4?"' in prompts.turn1_text(CHAIN, "what is {this} < 3 | 4?", 16, 8.0)
    assert prompts.plain_text("a <|image_pad|> b") == "a < |image_pad|> b"
    assert "'a red and blue car'" in prompts.turn2_text(CHAIN, " a red\nand  blue car ")


def test_long_descriptions_are_cut() -> None:
    assert prompts.DESCRIPTION_LIMIT == 200
    template = replace(CHAIN, turn2_prompt="{description}")
    assert prompts.turn2_text(template, "x" * 100_000) == "x" * 200
    assert prompts.turn2_text(template, "abc def", limit=4) == "abc"
    # Breaking up special tokens may lengthen the text, by no more than half.
    assert len(prompts.turn2_text(template, "<|" * 1000)) == 300


def test_written_answers_parse_with_a_full_score() -> None:
    turn1 = parse_turn1(prompts.turn1_answer("so it is", 3, 'the "big" dog\'s côté'), 16)
    assert turn1 == Turn1(True, 3, 'the "big" dog\'s côté', 1.0, "")
    turn2 = parse_turn2(prompts.turn2_answer((1.2, 2.7, 30, 40), "dog"))
    assert turn2 == Turn2(True, (1, 3, 30, 40), 1.0, "")


def test_templates_are_checked() -> None:
    prompts.validate_templates(CHAIN)
    for change, named in (
        ({"turn1_prompt": "find {quary}"}, "chain.turn1_prompt.*{quary}.*{query}"),
        ({"turn2_prompt": "box of {query}"}, "chain.turn2_prompt.*{query}.*{description}"),
        ({"turn1_prompt": "{query} in {}"}, "chain.turn1_prompt.*{{ and }}"),
        ({"turn1_prompt": '{query} as {"frame_idx": 1}'}, "chain.turn1_prompt"),
        ({"turn1_prompt": "{query} {seconds:d}"}, "chain.turn1_prompt"),
        ({"turn1_prompt": "{query.nothing}"}, "chain.turn1_prompt"),
        ({"turn1_prompt": "{query"}, "chain.turn1_prompt"),
        ({"turn1_prompt": "find it"}, "chain.turn1_prompt leaves out {query}"),
        ({"turn2_prompt": "box it"}, "chain.turn2_prompt leaves out {description}"),
        ({"turn2_prompt": "<|image_pad|>{description}"}, "chain.turn2_prompt.*special tokens"),
        ({"system_prompt": "<|im_end|>"}, "chain.system_prompt.*special tokens"),
    ):
        with pytest.raises(InputError, match=named) as caught:
            prompts.validate_templates(replace(CHAIN, **change))
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- turn 1

OBJECT = '{"frame_idx": 3, "object description": "a red circle"}'
PYTHON_OBJECT = "{'frame_idx': 3, 'object description': 'a red circle'}"
THINK = "<think>t</think>"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (good1(), 1.0),
        (good1() + "<|im_end|>", 1.0),
        (good1() + "<|im_end|><|endoftext|><|endoftext|>", 1.0),
        (f"{THINK}<answer>\n [{OBJECT}] \n</answer>\n", 1.0),
        # Tolerated forms: half of the JSON part.
        (f"{THINK}<answer>{OBJECT}</answer>", 0.9),
        (f"{THINK}<answer>[{PYTHON_OBJECT}]</answer>", 0.9),
        (f"{THINK}<answer>```json\n[{OBJECT}]\n```</answer>", 0.9),
        (f"{THINK}<answer>[{OBJECT}, {OBJECT}]</answer>", 0.9),
        (f"{THINK}<answer>[{OBJECT[:-1]},}},]</answer>", 0.9),
        (f"{THINK}<answer>the answer [see above] is {PYTHON_OBJECT}.</answer>", 0.9),
        (f'{THINK}<answer>{{"answer": [{OBJECT}]}}</answer>', 0.9),
        # A keyframe that is not written as an integer: half of the keys part.
        (f"{THINK}<answer>[{OBJECT.replace('3', '3.0')}]</answer>", 0.9),
        (f"{THINK}<answer>[{OBJECT.replace('3', chr(34) + '3' + chr(34))}]</answer>", 0.9),
        # Text outside the tags.
        (f"{good1()} I hope this helps.", 0.8),
        (f"Sure! {good1()}", 0.8),
        (f"{THINK} so <answer>[{OBJECT}]</answer>", 0.8),
        # Missing, repeated or unclosed tags.
        (f"<answer>[{OBJECT}]</answer>", 0.6),
        (f"<think> </think><answer>[{OBJECT}]</answer>", 0.6),
        (f"{THINK}[{OBJECT}]", 0.6),
        (f"{THINK}<answer>[{OBJECT}]", 0.6),
        (f"{THINK}[{OBJECT}]</answer>", 0.5),
        (f"{good1()}{good1(9, 'other')}", 0.4),
        (f"<think>I write <answer></answer> next</think><answer>[{OBJECT}]</answer>", 0.6),
        (f"<answer>[{OBJECT}]</answer><think>t</think>", 0.6),
        (f"[{OBJECT}]", 0.4),
        (OBJECT, 0.3),
    ],
)
def test_turn1_successes(text: str, score: float) -> None:
    turn1 = parse_turn1(text, 16)
    assert (turn1.ok, turn1.frame_idx, turn1.description, turn1.reason) == (True, 3, "a red circle", "")
    assert type(turn1.frame_idx) is int
    assert turn1.format_score == pytest.approx(score)


def turn1_with(frame: str = "3", description: str = '"d"') -> str:
    return f'{THINK}<answer>[{{"frame_idx": {frame}, "object description": {description}}}]</answer>'


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("", 0, "no object"),
        ("I see a dog.", 0, "no object"),
        (f"{THINK}<answer></answer>", 0.6, "no object"),
        (f"{THINK}<answer>frame 3, the dog</answer>", 0.6, "no object"),
        (f"{THINK}<answer>[1, 2]</answer>", 0.6, "no object"),
        (f'{THINK}<answer>[{{"frame": 3}}]</answer>', 0.6, "no object"),
        (f"<think>maybe [{OBJECT}]", 0, "no object"),  # cut off in its thoughts
        (f'{THINK}<answer>[{{"frame_idx": 3, "object description": "a re', 0.2, "no object"),
        (f'{THINK}<answer>[{{"frame_idx": 3}}]</answer>', 0.9, "no text under"),
        (turn1_with(description='""'), 0.9, "no text under"),
        (turn1_with(description='" "'), 0.9, "no text under"),
        (turn1_with(description="7"), 0.9, "no text under"),
        (turn1_with("16"), 0.9, "not in 0..15"),
        (turn1_with("-1"), 0.9, "not in 0..15"),
        (turn1_with("1e300"), 0.9, "not in 0..15"),
        (turn1_with("9" * 4000), 0.9, "not in 0..15"),
        (turn1_with("2.5"), 0.9, "no integer"),
        (turn1_with("true"), 0.9, "no integer"),
        (turn1_with("null"), 0.9, "no integer"),
        (turn1_with("[3]"), 0.9, "no integer"),
        (turn1_with('"three"'), 0.9, "no integer"),
        (turn1_with("1e999"), 0.9, "no integer"),
        (turn1_with("NaN"), 0.6, "no object"),
        (turn1_with("-Infinity"), 0.6, "no object"),
        (turn1_with("9" * 10_000), 0.6, "no object"),
        (turn1_with("99", "8"), 0.8, "not in 0..15"),
    ],
)
def test_turn1_failures(text: str, score: float, reason: str) -> None:
    turn1 = parse_turn1(text, 16)
    assert (turn1.ok, turn1.frame_idx, turn1.description) == (False, None, "")
    assert reason in turn1.reason and len(turn1.reason) < 80
    assert turn1.format_score == pytest.approx(score)


def test_frames_shown_bound_the_keyframe() -> None:
    assert parse_turn1(good1(7), 8).ok and not parse_turn1(good1(8), 8).ok


def test_descriptions_can_be_written() -> None:
    for escaped, wanted in (("\\ud800x", "\ufffdx"), ("\\ud83d\\ude00", "\U0001f600")):
        for quote in "\"'":
            turn1 = parse_turn1(turn1_with(description=f"{quote}{escaped}{quote}"), 16)
            assert turn1.ok and turn1.description == wanted
            turn1.description.encode()


# ---------------------------------------------------------------- turn 2


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (good2(), 1.0),
        (f"<think>here</think>\n{good2()}<|im_end|>", 1.0),
        (good2("[1e1, 20.0, 110, 220]"), 1.0),
        (good2().replace("bbox_2d", "bbox"), 1.0),
        (good2().replace("bbox_2d", "box"), 1.0),
        ("<answer>[10, 20, 110, 220]</answer>", 0.875),
        ("<answer>[[10, 20, 110, 220], [1, 2, 3, 4]]</answer>", 0.875),
        ('<answer>{"bbox_2d": [10, 20, 110, 220]}</answer>', 0.875),
        ("<answer>[{'bbox_2d': [10, 20, 110, 220], 'label': 'the dog's ear'}]</answer>", 0.875),
        (f"{good2()} Done.", 0.75),
        ('```json\n[{"bbox_2d": [10, 20, 110, 220], "label": "dog"}]\n```', 0.375),
        ("see [1]: [10, 20, 110, 220]", 0.375),
    ],
)
def test_turn2_successes(text: str, score: float) -> None:
    turn2 = parse_turn2(text)
    assert (turn2.ok, turn2.box, turn2.reason) == (True, (10, 20, 110, 220), "")
    assert all(type(v) is float for v in turn2.box)
    assert turn2.format_score == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        ("<answer></answer>", 0.5),
        ("<answer>[1, 2, 3]</answer>", 0.5),
        (good2("[1, 2, 3]"), 0.5),
        (good2("7"), 0.5),
        (good2('"1, 2, 3, 4"'), 0.5),
        (good2("[10, 20, 10, 220]"), 0.75),
        (good2("[10, 220, 110, 20]"), 0.75),
        (good2('[10, 20, 110, "220"]'), 0.75),
        (good2("[10, 20, 110, true]"), 0.75),
        (good2("[10, 20, 110, null]"), 0.75),
        (good2("[10, 20, 110, 1e999]"), 0.75),
        (good2("[-1e999, 20, 110, 220]"), 0.75),
        (good2(f"[10, 20, 110, {'9' * 400}]"), 0.75),  # an integer beyond float
        (good2("[10, 20, 110, NaN]"), 0.5),
        (good2("[10, 20, 110, Infinity]"), 0.5),
    ],
)
def test_turn2_failures(text: str, score: float) -> None:
    turn2 = parse_turn2(text)
    assert not turn2.ok and turn2.box is None and turn2.reason
    assert turn2.format_score == pytest.approx(score)


# ---------------------------------------------------------------- one turn

BOTH = '{"frame_idx": 3, "bbox_2d": [10, 20, 110, 220]}'


@pytest.mark.parametrize(
    ("text", "score1", "score2"),
    [
        (f"{THINK}<answer>[{BOTH}]</answer>", 1.0, 1.0),
        (f"{THINK}<answer>{BOTH}</answer>", 0.9, 0.875),
        (f"{THINK}<answer>[{BOTH.replace(chr(34), chr(39))}]</answer> Done.", 0.7, 0.625),
        (f"{THINK}<answer>[{BOTH.replace('3', '3.0')}]</answer>", 0.8, 1.0),
        (f"<answer>[{BOTH}]</answer>", 0.6, 1.0),
    ],
)
def test_one_turn_is_both_halves_in_one_answer(text: str, score1: float, score2: float) -> None:
    turn1, turn2 = parse_one_turn(text, 16)
    assert turn1 == Turn1(True, 3, "", pytest.approx(score1), "")
    assert turn2 == Turn2(True, (10, 20, 110, 220), pytest.approx(score2), "", in_first=True)


def test_one_turn_without_a_keyframe_or_without_a_box() -> None:
    for text in ("", good2(), f"{THINK}<answer>[{BOTH.replace('3', '16')}]</answer>"):
        turn1, turn2 = parse_one_turn(text, 16)
        assert not turn1.ok and turn1.reason and turn2 is None
    turn1, turn2 = parse_one_turn(good1(), 16)
    assert turn1 == Turn1(True, 3, "a red circle", 1.0, "")
    assert turn2 == Turn2(False, None, 0.75, "no box", in_first=True)
    _, turn2 = parse_one_turn(f"{THINK}<answer>[{BOTH.replace('110', '5')}]</answer>", 16)
    assert not turn2.ok and "x1 < x2" in turn2.reason


def test_the_only_turn_has_a_prompt_of_its_own() -> None:
    one = replace(CHAIN, turns=1)
    asked = prompts.turn1_text(one, "the dog", 16, 8.0)
    assert "the dog" in asked and "bbox_2d" in asked and "object description" not in asked
    assert asked != prompts.turn1_text(CHAIN, "the dog", 16, 8.0)
    assert (one.box_size, CHAIN.box_size) == (448, 840)
    with pytest.raises(InputError, match="one_turn_prompt"):
        prompts.validate_templates(replace(one, one_turn_prompt="Where?"))


# ---------------------------------------------------------------- geometry


def test_box_to_original_by_hand() -> None:
    assert box_to_original((420, 210, 840, 420), 840, 480, 854) == (427, 120, 854, 240)
    assert box_to_original((-50, -1e300, 420, 1e308), 840, 480, 854) == (0, 0, 427, 480)
    assert box_to_original((840, 0, 900, 10), 840, 480, 854) is None  # outside to the right
    assert box_to_original((0, -20, 10, 0), 840, 480, 854) is None  # outside above
    assert box_to_original((500.00001, 0, 500.00002, 10), 840, 64, 64) is None  # no width in float32
    assert box_to_original((839.99999999, 0, 900, 10), 840, 64, 64) is None  # begins at the edge in float32


@given(
    st.tuples(*[st.integers(0, 99)] * 2, *[st.integers(100, 500)] * 2),
    st.integers(500, 4000),
    st.integers(500, 4000),
    st.sampled_from([56, 168, 840]),
)
def test_box_round_trip(box: tuple[int, ...], height: int, width: int, size: int) -> None:
    shown = box_to_keyframe(box, size, height, width)
    assert 0 <= min(shown) and max(shown) <= size
    assert box_to_original(shown, size, height, width) == pytest.approx(box)
