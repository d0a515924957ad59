"""What the embedded policy is taught: true answers, packed as the conversations that the engine will hold."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revseg_jax.chain.parsing import parse_turn1, parse_turn2
from revseg_jax.chain.prompts import conversation_text
from revseg_jax.config import load_config
from revseg_jax.data.synthetic import render
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.asset import make_policy
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.policy_training import STAGES
from revseg_jax.pretraining.primitives import (
    BOX_GRID,
    EXACT,
    box_conversation,
    chain_conversation,
    grid_box,
    loosen,
    video_conversation,
    view,
)

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def chain():
    return load_config(CONFIG).chain


@pytest.fixture(scope="module")
def embedded():
    return load_policy("embedded")


def true_box(scene, frame, name, size):
    """In pixels of an image of `size`, from the mask alone."""
    which = [item.description for item in scene.objects].index(name)
    rows, columns = np.nonzero(scene.masks[frame, which])
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * size / scene.frames.shape[1]


@pytest.mark.parametrize("seed", range(6))
def test_answers_about_boxes_are_true(chain, seed):
    scene = render(seed, "easy")
    talk = box_conversation(np.random.default_rng(seed), view(scene, np.arange(8)), chain)
    for turn in talk.turns:
        name = turn.user.split("'")[1]
        box = parse_turn2(turn.answer).box if "<answer>" in turn.answer else json.loads(turn.answer)
        exact = true_box(scene, talk.image_frame, name, chain.keyframe_size)
        assert np.abs(np.array(box) - exact).max() <= BOX_GRID


@pytest.mark.parametrize("seed", range(6))
def test_answers_about_the_video_are_true(chain, seed):
    scene = render(seed, "easy")
    talk = video_conversation(np.random.default_rng(seed), view(scene, np.arange(8)), chain)
    meant = {f"What is meant by {e.query!r}?": scene.objects[e.target].description for e in scene.expressions}
    names = [item.description for item in scene.objects]
    kinds = set()
    for turn in talk.turns:
        kinds.add(turn.user.split()[1])
        if turn.user in meant:
            assert turn.answer == meant[turn.user]
        elif turn.user.startswith("Which objects"):
            assert turn.answer.split(", ") == sorted(names)
        else:
            name = next(name for name in names if f"the {name} " in turn.user)
            boxes = [
                true_box(scene, t, name, chain.frame_size) if scene.masks[t, names.index(name)].any() else np.zeros(4)
                for t in range(8)
            ]
            areas = np.array([(b[2] - b[0]) * (b[3] - b[1]) for b in boxes])
            thought = turn.answer.split("</think>")[0]
            told = np.array([int(side) for side in thought.split(": ")[1].split(", ")])
            assert np.abs(told - np.sqrt(areas)).max() <= BOX_GRID / 2
            answer = parse_turn1(turn.answer, 8)
            assert areas[answer.frame_idx] == areas.max() and answer.description == name
    assert kinds == {"objects", "which", "is"}


def test_a_chains_keyframe_is_any_visible_frame_and_its_box_holds_the_object(chain):
    scene = render(3, "easy")
    seen, rng = view(scene, np.arange(8)), np.random.default_rng(0)
    expressions = {e.query: e.target for e in scene.expressions}
    frames: dict[int, set[int]] = {}
    for _ in range(300):
        talk = chain_conversation(rng, seen, chain)
        query = next(query for query in expressions if f'"{query}"' in talk.turns[0].user)
        target = expressions[query]
        first, second = parse_turn1(talk.turns[0].answer, 8), parse_turn2(talk.turns[1].answer)
        assert first.description == scene.objects[target].description
        assert first.frame_idx == talk.image_frame and seen.visible[first.frame_idx, target]
        frames.setdefault(target, set()).add(first.frame_idx)
        exact = true_box(scene, first.frame_idx, first.description, chain.keyframe_size)
        x1, y1, x2, y2 = np.array(second.box) - exact
        assert max(x1, y1) <= BOX_GRID and min(x2, y2) >= -BOX_GRID
    for target, chosen in frames.items():
        assert chosen == set(np.flatnonzero(seen.visible[:, target]))


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.floats(0, 100)] * 2, *[st.floats(1, 28)] * 2),
)
def test_boxes_are_exact_or_the_smallest_half_or_quarter_that_holds_them(seed, place):
    x, y, width, height = place
    box = np.array([x, y, x + width, y + height])
    loose = loosen(np.random.default_rng(seed), box, 128)
    if not (loose == box).all():
        assert set(loose) <= {0, 64, 128}
        assert (loose[:2] <= box[:2]).all() and (loose[2:] >= box[2:]).all()
        assert (box[:2] - loose[:2] < 64).all() and (loose[2:] - box[2:] < 64).all()
    grid = np.array(grid_box(loose, 128, 168))
    assert (grid % BOX_GRID == 0).all() and (grid[2:] > grid[:2]).all()


def test_the_promised_share_of_boxes_is_exact():
    rng, box = np.random.default_rng(0), np.array([40.0, 50.0, 60.0, 80.0])
    assert np.mean([(loosen(rng, box, 128) == box).all() for _ in range(4000)]) == pytest.approx(EXACT, abs=0.03)


@pytest.mark.parametrize("index", range(4))
def test_a_packed_chain_is_the_conversation_that_the_engine_holds(embedded, chain, index):
    """Token by token the text of the whole chain, and trained exactly where the policy speaks."""
    tokenizer = embedded.tokenizer
    maker = ExampleMaker(tokenizer, embedded.policy.config, chain, "easy", (1, 1, 1), 260, seed=5)
    example = maker(index)
    mask, tokens, trained = example["mask"][0], example["tokens"][0], example["trained"][0]
    whole = np.concatenate([maker.prefix_tokens, tokens[mask]])
    visual = np.isin(whole, [maker.model.image_token_id, maker.model.video_token_id])
    once = whole[~(visual & np.roll(visual, 1))]  # a video or an image is one placeholder in the text

    spoken = tokenizer.decode(tokens[trained]).split("<|im_end|>")
    answers = [text for text in spoken if text]
    assert len(answers) == 2
    turn1 = parse_turn1(answers[0], chain.frames)
    text = tokenizer.decode(once)
    query = text.split('Question: "')[1].split('"\n')[0]
    seconds = float(text.split("lasts ")[1].split(" ")[0])
    expected = conversation_text(chain, query, chain.frames, seconds, answers[0], turn1.description, answers[1])
    assert text == expected.removesuffix("\n")


def test_the_stage_without_video_shows_none(embedded, chain):
    maker = ExampleMaker(embedded.tokenizer, embedded.policy.config, chain, "easy", (0, 2, 0), 140, seed=5)
    example = maker(0)
    assert "frames" not in example and maker.model.video_token_id not in maker.prefix_tokens
    assert (example["tokens"] == maker.model.image_token_id).sum(-1).tolist() == [36, 36]


@pytest.mark.slow
def test_make_assets_writes_a_policy_that_loads_and_says_how_it_was_made(tmp_path):
    stages = [replace(stage, steps=2, clips=2) for stage in STAGES]
    make_policy(tmp_path / "policy", load_config(CONFIG), 3, stages)
    note = json.loads((tmp_path / "policy" / "asset.json").read_text())
    assert note["sha256"] == hashlib.sha256((tmp_path / "policy" / "model.safetensors").read_bytes()).hexdigest()
    assert note["seed"] == 3 and note["steps"] == {"boxes": 2, "conversations": 2}
    assert load_policy(tmp_path / "policy").chain == load_config(CONFIG).chain
