"""What the embedded policy is taught: true answers, packed as the conversations that the engine will hold."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revseg_jax.chain.parsing import parse_turn1, parse_turn2
from revseg_jax.chain.prompts import conversation_text
from revseg_jax.config import load_config
from revseg_jax.data.synthetic import render
from revseg_jax.data.synthetic.queries import TEMPLATES
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.asset import make_policy
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.history import template_answers, track_facts
from revseg_jax.pretraining.pointing import HEAD, pointing_loss, shown_objects
from revseg_jax.pretraining.policy_training import STAGES, named_stages
from revseg_jax.pretraining.primitives import (
    BOX_GRID,
    EXACT,
    box_conversation,
    chain_conversation,
    grid_box,
    loosen,
    meaning_conversation,
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
    names = [item.description for item in scene.objects]
    kinds = set()
    for turn in talk.turns:
        kinds.add(turn.user.split()[1])
        if turn.user.startswith("Which objects"):
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
    assert kinds == {"objects", "which"}


@pytest.mark.parametrize("seed", range(6))
def test_answers_about_meanings_are_true(seed):
    scene = render(seed, "easy")
    talk = meaning_conversation(np.random.default_rng(seed), view(scene, np.arange(8)))
    meant = {f"What is meant by {e.query!r}?": scene.objects[e.target].description for e in scene.expressions}
    assert {turn.user: turn.answer for turn in talk.turns} == meant
    assert all(scene.objects[turn.target].description == turn.answer for turn in talk.turns)


def test_facts_agree_with_the_questions_that_ask_for_them():
    """What templates conclude from whole tracks is what the facts say at the end of the clip."""
    asked = dict.fromkeys(("fastest", "never_moves", "grows", "shrinks", "moves_left", "moves_down"), 0)
    for seed in range(150):
        scene = render(seed, "easy")
        seen = view(scene, np.arange(len(scene.frames)))
        facts, answers = track_facts(seen), template_answers(seen)
        inside = scene.drawing.footprint > 0
        start = facts[inside.argmax(0), np.arange(3)]
        assert (start[inside.any(0)][:, [2, 3, 6]] == 0).all()  # nothing has moved or grown when it comes into view
        ends = facts[-1]
        last = {"fastest": ends[:, 4], "never_moves": -ends[:, 4], "grows": ends[:, 6], "shrinks": -ends[:, 6]}
        last |= {"moves_left": -ends[:, 2], "moves_down": ends[:, 3]}
        for expression in scene.expressions:
            if expression.template in last and inside[-1].all():
                asked[expression.template] += 1
                assert last[expression.template].argmax() == expression.target, (seed, expression)
                column = answers[:, list(TEMPLATES).index(expression.template)]
                assert column.tolist() == [int(k == expression.target) for k in range(3)]
            elif expression.mentions is not None:
                assert (answers[:, list(TEMPLATES).index(expression.template)] == -1).all()
    assert min(asked.values()) > 0


def test_a_chains_keyframe_is_any_visible_frame_and_its_box_holds_the_object(chain):
    scene = render(3, "easy")
    seen, rng = view(scene, np.arange(8)), np.random.default_rng(0)
    expressions = {e.query: e.target for e in scene.expressions}
    frames: dict[int, set[int]] = {}
    for _ in range(300):
        talk = chain_conversation(rng, seen, chain)
        query = next(query for query in expressions if f"meant by '{query}'?" in talk.turns[0].user)
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
def test_boxes_are_exact_or_a_half_that_holds_them_or_everything(seed, place):
    x, y, width, height = place
    box = np.array([x, y, x + width, y + height])
    loose = loosen(np.random.default_rng(seed), box, 128)
    if not (loose == box).all():
        sides = (loose[2:] - loose[:2]).tolist()
        assert set(loose) <= {0, 64, 128}
        assert (loose[:2] <= box[:2]).all() and (loose[2:] >= box[2:]).all()
        in_no_half = ((box[:2] < 64) & (box[2:] > 64)).all()
        assert sides == [128, 128] if in_no_half else sorted(sides) == [64, 128]
    grid = np.array(grid_box(loose, 128, 168))
    assert (grid % BOX_GRID == 0).all() and (grid[2:] > grid[:2]).all()


def test_the_promised_share_of_boxes_is_exact():
    rng, box = np.random.default_rng(0), np.array([40.0, 50.0, 60.0, 80.0])
    assert np.mean([(loosen(rng, box, 128) == box).all() for _ in range(4000)]) == pytest.approx(EXACT, abs=0.03)


@pytest.mark.parametrize("index", range(4))
def test_a_packed_chain_is_the_conversation_that_the_engine_holds(embedded, chain, index):
    """Token by token the text of the whole chain, and trained exactly where the policy speaks."""
    tokenizer = embedded.tokenizer
    maker = ExampleMaker(tokenizer, embedded.policy.config, chain, "easy", (1, 1, 1, 1), 260, seed=5)
    example = maker(index)
    mask, tokens, trained = example["mask"][0], example["tokens"][0], example["trained"][0] > 0
    whole = np.concatenate([maker.prefix_tokens, tokens[mask]])
    visual = np.isin(whole, [maker.model.image_token_id, maker.model.video_token_id])
    once = whole[~(visual & np.roll(visual, 1))]  # a video or an image is one placeholder in the text

    spoken = tokenizer.decode(tokens[trained]).split("<|im_end|>")
    answers = [text for text in spoken if text]
    assert len(answers) == 2
    turn1 = parse_turn1(answers[0], chain.frames)
    slot = example["pointers"][0, 0, 0]  # from here the name is predicted
    assert tokenizer.decode(tokens[: slot + 1]).endswith("it is the")
    assert tokenizer.decode(tokens[slot + 1 :]).startswith(f" {turn1.description}:")
    text = tokenizer.decode(once)
    query = text.split("What is meant by '")[1].split("'?")[0]
    seconds = float(text.split("lasts ")[1].split(" ")[0])
    expected = conversation_text(chain, query, chain.frames, seconds, answers[0], turn1.description, answers[1])
    assert text == expected.removesuffix("\n")


@pytest.mark.parametrize("frames", [6, 10])
def test_an_example_shows_as_many_frames_as_asked_for(embedded, chain, frames):
    """And as many sizes in the thoughts; two in nine of the easy clips are shorter than 10 frames."""
    chain = replace(chain, frames=frames)
    maker = ExampleMaker(embedded.tokenizer, embedded.policy.config, chain, "easy", (1, 0, 0, 0), 260, seed=5)
    for example in map(maker, range(12)):
        assert len(example["frames"]) == len(example["video_colour"]) == frames
        answer = embedded.tokenizer.decode(example["tokens"][0][example["trained"][0] > 0])
        thought = answer.split("</think>")[0]
        assert len(thought.split(": ")[1].split(", ")) == frames


def test_more_frames_than_a_clip_has_are_refused(embedded, chain):
    chain = replace(chain, frames=18)
    maker = ExampleMaker(embedded.tokenizer, embedded.policy.config, chain, "easy", (1, 0, 0, 0), 260, seed=5)
    with pytest.raises(InputError, match="chain.frames=18: easy clips have 16 at most"):
        maker(0)


def test_the_stage_without_video_shows_none(embedded, chain):
    maker = ExampleMaker(embedded.tokenizer, embedded.policy.config, chain, "easy", (0, 2, 0, 0), 140, seed=5)
    example = maker(0)
    assert "frames" not in example and maker.model.video_token_id not in maker.prefix_tokens
    assert (example["tokens"] == maker.model.image_token_id).sum(-1).tolist() == [36, 36]


def test_pointing_is_the_attention_paid_to_the_object_meant():
    """Against a softmax in NumPy over the prefix and the visible part of the suffix, one pointer at a time."""
    rng = np.random.default_rng(0)
    prompts, groups, slots, prefix, heads, width = 2, 3, 6, 12, 2, 4
    queries, keys = rng.normal(size=(2, prompts, groups, slots, heads, width)).astype(np.float32)
    prefix_keys = rng.normal(size=(prompts, prefix, heads, width)).astype(np.float32)
    visible = np.broadcast_to(np.tril(np.ones((slots, slots), bool)), (prompts, groups, slots, slots))
    objects = rng.integers(-1, 3, (prompts, 2, 4, 2, 4))  # of 8 visual tokens, the third to the tenth of the prefix
    pointers = rng.integers(0, [slots, 3], (prompts, groups, 4, 2)).astype(np.int32)
    pointers[0, 1, 2:] = -1
    losses = []
    for b, g, m in np.ndindex(prompts, groups, 4):
        slot, target = pointers[b, g, m]
        tokens = [2 + i for i, patches in enumerate(objects[b].reshape(8, -1)) if target in patches]
        if slot < 0 or not tokens:
            continue
        seen = np.concatenate([prefix_keys[b, :, HEAD], keys[b, g, : slot + 1, HEAD]])
        weights = np.exp(seen @ queries[b, g, slot, HEAD] / 2)
        losses.append(-np.log(weights[tokens].sum() / weights.sum()))
    shows = shown_objects(jnp.asarray(objects), jnp.asarray(2), prefix)
    loss = pointing_loss(queries, keys, prefix_keys, visible, pointers, shows)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_stages_by_name():
    assert named_stages("") == STAGES
    assert [stage.name for stage in named_stages("chains,boxes")] == ["boxes", "chains"]  # in the recipe's order
    with pytest.raises(InputError, match="no stage is called dances"):
        named_stages("boxes,dances")


@pytest.mark.slow
def test_make_assets_writes_a_policy_that_loads_and_says_how_it_was_made(tmp_path):
    stages = [replace(stage, steps=2, clips=2) for stage in (STAGES[0], STAGES[-1])]
    make_policy(tmp_path / "policy", load_config(CONFIG), 3, stages)
    note = json.loads((tmp_path / "policy" / "asset.json").read_text())
    assert note["sha256"] == hashlib.sha256((tmp_path / "policy" / "model.safetensors").read_bytes()).hexdigest()
    assert note["seed"] == 3 and note["steps"] == {"boxes": 2, "counts": 2}
    assert load_policy(tmp_path / "policy").chain == load_config(CONFIG).chain

    make_policy(tmp_path / "next", load_config(CONFIG), 4, stages[-1:], start=tmp_path / "policy")
    onwards = json.loads((tmp_path / "next" / "asset.json").read_text())
    assert onwards["start"] == {name: note[name] for name in ("command", "seed", "steps", "sha256")}
    assert onwards["sha256"] != note["sha256"]
    assert onwards["command"].endswith("--start START --stages counts")
