"""The two-turn engine against whole conversations, the trainer's numbers and NumPy."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg_jax.chain.prompts import conversation_text
from revseg_jax.config import LearnerConfig, load_config
from revseg_jax.data.frames import decode_frame, decode_square, encode_frame, resize_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic import render
from revseg_jax.errors import InputError
from revseg_jax.learner.update import make_learner
from revseg_jax.policy.rope import sequence_positions
from revseg_jax.rollout import engine as phases
from revseg_jax.rollout.engine import Prompt
from revseg_jax.rollout.keyframes import encode_keyframes
from revseg_jax.rollout.loading import load_engine
from revseg_jax.rollout.sampling import SamplingConfig, draw, first_largest, rollout_keys, truncate

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"


def make_prompts(count: int, frames: int = 8) -> list[Prompt]:
    prompts = []
    for seed in range(count):
        scene = render(seed, "easy", "test", frames=frames)
        sampled = sample_frames(frames, 8)
        small = [resize_square(scene.frames[t], 112) for t in sampled]
        query = scene.expressions[0].query if scene.expressions else "the red circle"
        prompts.append(
            Prompt(
                query=query,
                frames=np.stack(small + small[-1:] * (8 - len(small))),
                frame_count=len(sampled),
                seconds=frames / 4,
                jpegs=[encode_frame(scene.frames[t]) for t in sampled],
                size=(128, 128),
            )
        )
    return prompts


@pytest.fixture(scope="module")
def loaded():
    return load_engine(load_config(CONFIG))


@pytest.fixture(scope="module")
def sampled(loaded):
    """4 prompts x 3 rollouts; the last prompt's video has 5 frames."""
    prompts = make_prompts(3) + make_prompts(1, frames=5)
    keys = rollout_keys(7, 0, np.arange(4), 3)
    batch, chains = loaded.engine.sample((loaded.trained, loaded.frozen), prompts, keys)
    return prompts, batch, chains


def whole_sequence(batch, b: int, g: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of one rollout without any padding."""
    tokens = np.concatenate([batch.prefix_tokens[b][batch.prefix_mask[b]], batch.tokens[b, g][batch.mask[b, g]]])
    suffix = batch.positions[b, g][:, batch.mask[b, g]]
    return tokens, np.concatenate([batch.prefix_positions[b][:, batch.prefix_mask[b]], suffix], axis=1)


def test_slots_hold_the_conversation_of_the_chat_template(loaded, sampled):
    prompts, batch, chains = sampled
    encoder = loaded.engine.encoder
    checked = 0
    for b, prompt in enumerate(prompts):
        for g, rollout in enumerate(chains[b]):
            if rollout.turn2 is None or rollout.truncated:
                continue
            text = conversation_text(
                encoder.chain,
                prompt.query,
                prompt.frame_count,
                prompt.seconds,
                rollout.answer1,
                rollout.turn1.description,
                rollout.answer2,
            )
            steps = -(-prompt.frame_count // 2)
            expanded = text.replace("<|video_pad|>", "<|video_pad|>" * steps * 16)
            expanded = expanded.replace("<|image_pad|>", "<|image_pad|>" * 36)
            tokens, positions = whole_sequence(batch, b, g)
            assert encoder.tokenizer.decode(tokens) + "\n" == expanded
            expected = sequence_positions(tokens, encoder.model, [(steps, 8, 8), (1, 12, 12)], [1.0])
            np.testing.assert_array_equal(positions, expected)
            checked += 1
    assert checked >= 6


def test_trainer_computes_the_logprobs_that_the_sampler_saw(loaded, sampled):
    _, batch, _ = sampled
    learner = make_learner(loaded.engine.graphdef, LearnerConfig(), loaded.engine.encoder.layout)
    again = learner.logprobs(loaded.trained, loaded.frozen, batch)
    gap = np.abs(np.asarray(again) - batch.logprobs)[batch.generated]
    assert len(gap) > 100 and gap.mean() < 1e-6 and np.quantile(gap, 0.99) < 1e-5
    # One token in a thousand amplifies rounding: of 2,450 tokens of three seeds the sampler was up to 2.7e-5 and the
    # trainer up to 1.7e-5 away from the same policy in float64, and they up to 1.2e-5 from each other.
    assert gap.max() < 3e-5


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_what_is_trained_is_the_distribution_at_the_temperature_of_sampling(loaded, temperature):
    engine = replace(loaded.engine, sampling=replace(loaded.engine.sampling, temperature=temperature))
    batch, _ = engine.sample((loaded.trained, loaded.frozen), make_prompts(2), rollout_keys(7, 0, np.arange(2), 3))

    def gap(temperature):
        learner = make_learner(engine.graphdef, LearnerConfig(), engine.encoder.layout, temperature=temperature)
        again = learner.logprobs(loaded.trained, loaded.frozen, batch)
        return np.abs(np.asarray(again) - batch.logprobs)[batch.generated].mean()

    assert gap(temperature) < 2e-6 < 1e-3 < gap(1.0)


def test_a_failed_first_turn_ends_the_rollout(loaded):
    sampling = replace(loaded.engine.sampling, temperature=30.0)  # noise: hardly anything parses
    prompts = make_prompts(2)
    keys = rollout_keys(0, 0, np.arange(2), 3)
    batch, chains = replace(loaded.engine, sampling=sampling).sample((loaded.trained, loaded.frozen), prompts, keys)
    layout = loaded.engine.encoder.layout
    failed = np.array([[not rollout.turn1.ok for rollout in row] for row in chains])
    assert failed.any()
    assert not batch.mask[failed][:, layout.turn2_prompt_start :].any()
    assert all(rollout.turn2 is None and not rollout.ok for rollout in np.array(chains)[failed])
    assert not np.isin(batch.tokens[batch.generated], sampling.forbidden).any()


def test_rollouts_do_not_depend_on_the_batch(loaded, sampled):
    prompts, batch, _ = sampled
    keys = rollout_keys(7, 0, np.array([2, 3]), 3)
    alone, _ = loaded.engine.sample((loaded.trained, loaded.frozen), prompts[2:], keys)
    np.testing.assert_array_equal(alone.tokens, batch.tokens[2:])


def test_rollouts_do_not_depend_on_the_devices(loaded, sampled):
    """The same tokens on 8 devices as on one; and the optimiser's moments are spread as the parameters are."""
    _, batch, _ = sampled
    code = (
        "import json, numpy as np\n"
        "from tests.test_rollout import CONFIG, make_prompts\n"
        "import jax, optax\n"
        "from revseg_jax.config import LearnerConfig, load_config\n"
        "from revseg_jax.learner.update import make_learner\n"
        "from revseg_jax.rollout.loading import load_engine\n"
        "from revseg_jax.rollout.sampling import rollout_keys\n"
        "loaded = load_engine(load_config(CONFIG, ['mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2']))\n"
        "prompts = make_prompts(3) + make_prompts(1, frames=5)\n"
        "keys = rollout_keys(7, 0, np.arange(4), 3)\n"
        "batch, _ = loaded.engine.sample((loaded.trained, loaded.frozen), prompts, keys)\n"
        "layout = loaded.engine.encoder.layout\n"
        "learner = make_learner(loaded.engine.graphdef, LearnerConfig(), layout, loaded.placement)\n"
        "state = learner.init(loaded.trained)\n"
        "for moment in ('mu', 'nu'):\n"
        "    spread = jax.tree.map(lambda x: x.sharding, optax.tree.get(state.optimizer, moment))\n"
        "    assert spread == jax.tree.map(lambda x: x.sharding, state.trained)\n"
        "assert not state.trained['text']['embedding'][...].is_fully_replicated\n"
        "print(json.dumps(batch.tokens.tolist()))\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.array(json.loads(done.stdout.splitlines()[-1])), batch.tokens)


def test_keys_depend_on_seed_step_prompt_and_sample():
    data = lambda *a: np.asarray(jax.random.key_data(rollout_keys(*a)))  # noqa: E731
    base = data(0, 0, np.arange(4), 3)
    assert len(np.unique(base.reshape(12, -1), axis=0)) == 12
    np.testing.assert_array_equal(data(0, 0, np.array([2]), 2)[0], base[2, :2])
    assert (data(1, 0, np.arange(4), 3) != base).any() and (data(0, 1, np.arange(4), 3) != base).any()


def test_caches_are_worked_on_in_place(loaded, sampled, monkeypatch):
    """Each phase takes over the memory of the suffix cache that it is given."""
    prompts, _, _ = sampled
    given = []
    for name, place in (("read_turn2", 4), ("answer_turn2", 6)):
        phase = getattr(phases, name)
        monkeypatch.setattr(phases, name, lambda *a, phase=phase, at=place: given.append(a[at]) or phase(*a))
    loaded.engine.sample((loaded.trained, loaded.frozen), prompts, rollout_keys(7, 0, np.arange(4), 3))
    assert [cache.key.is_deleted() and cache.value.is_deleted() for cache in given] == [True, True]


def test_sampler_and_trainer_agree_in_bfloat16_on_average():
    loaded = load_engine(load_config(CONFIG, ["policy.dtype=bfloat16"]))
    batch, _ = loaded.engine.sample(
        (loaded.trained, loaded.frozen), make_prompts(4), rollout_keys(7, 0, np.arange(4), 3)
    )
    learner = make_learner(loaded.engine.graphdef, LearnerConfig(), loaded.engine.encoder.layout)
    again = learner.logprobs(loaded.trained, loaded.frozen, batch)
    gap = np.abs(np.asarray(again) - batch.logprobs)[batch.generated]
    assert 0 < gap.mean() < 0.02


@pytest.fixture(scope="module")
def one_turn():
    config = load_config(CONFIG, ["chain.turns=1", "chain.one_turn_prompt='Question: {query}'"])
    return load_engine(config)


def test_a_chain_of_one_turn_ends_with_its_first_answer(one_turn):
    batch, chains = one_turn.engine.sample(
        (one_turn.trained, one_turn.frozen), make_prompts(2), rollout_keys(7, 0, np.arange(2), 3)
    )
    layout = one_turn.engine.encoder.layout
    assert batch.tokens.shape == (2, 3, 1 + layout.turn1) and not layout.turns.any()
    assert (batch.keyframe_index == -1).all() and not batch.keyframes.any()
    for rollout in (rollout for row in chains for rollout in row):
        assert rollout.answer2 is None and rollout.tokens2 == 0
        assert rollout.turn2 is None or rollout.turn2.in_first
    learner = make_learner(one_turn.engine.graphdef, LearnerConfig(), layout)
    again = learner.logprobs(one_turn.trained, one_turn.frozen, batch)
    assert np.abs(np.asarray(again) - batch.logprobs)[batch.generated].max() < 1e-5


def test_the_box_of_a_chain_of_one_turn_is_in_pixels_of_the_shown_frame(one_turn, monkeypatch):
    """The embedded policy was never taught such answers, so one is put into its mouth."""
    encoder, end = one_turn.engine.encoder, one_turn.engine.sampling.end_token
    text = '<think>it is there</think>\n<answer>[{"frame_idx": 2, "bbox_2d": [28, 56, 84, 112]}]</answer>'
    said = np.array([*encoder.tokenizer(text)["input_ids"], end])
    tokens = np.full((1, 2, encoder.layout.turn1), one_turn.engine.sampling.pad_token)
    tokens[..., : len(said)] = said
    answers = tokens, np.zeros(tokens.shape), np.broadcast_to(np.arange(tokens.shape[-1]) < len(said), tokens.shape)
    monkeypatch.setattr(phases, "answer_turn1", lambda *_: (answers, None))
    (prompt,) = make_prompts(1)
    batch, ((rollout, _),) = one_turn.engine.sample(
        (one_turn.trained, one_turn.frozen), [prompt], rollout_keys(0, 0, np.arange(1), 2)
    )
    assert rollout.ok and rollout.turn1.frame_idx == 2 and not rollout.truncated and rollout.answer1 == text
    assert rollout.box == (32, 64, 96, 128)  # the frame of 128 pixels was shown at 112
    whole = encoder.tokenizer.decode(whole_sequence(batch, 0, 0)[0])
    assert whole.endswith(f"<|im_start|>assistant\n{text}<|im_end|>") and f"Question: {prompt.query}" in whole


@settings(max_examples=60, deadline=None)
@given(
    # Tenths: distinct in float32 too, so that the reference need not say which of two equal tokens is kept.
    logits=st.lists(st.integers(-80, 80).map(lambda n: n / 10), min_size=5, max_size=12, unique=True),
    top_p=st.floats(0.05, 0.99),
    top_k=st.integers(0, 20),  # there may be fewer tokens
)
def test_truncation_keeps_the_smallest_set(logits, top_p, top_k):
    kept = np.isfinite(np.asarray(truncate(jnp.array(logits, jnp.float32), top_p, top_k)))
    order = np.argsort(np.float32(logits))[::-1]
    order = order[:top_k] if top_k else order
    chosen = np.float64(np.float32(logits))[order]
    probability = np.exp(chosen) / np.exp(chosen).sum()
    before = np.cumsum(probability) - probability
    if np.abs(before - top_p).min() > 1e-5:  # float32 decides ties its own way
        assert set(np.flatnonzero(kept)) == set(order[before < top_p])


def test_draw_reports_the_untruncated_distribution_and_never_a_forbidden_token():
    logits = jnp.array([[[5.0, 1.0, 0.5, 9.0]]])
    config = SamplingConfig(0.5, 1.0, 2, end_token=1, pad_token=0, forbidden=(3,))
    expected = np.asarray(jax.nn.log_softmax(logits / 0.5))[0, 0]
    for seed in range(20):
        token, logprob = draw(logits, rollout_keys(seed, 0, np.zeros(1, int), 1), config)
        assert int(token[0, 0]) in (0, 1)
        assert float(logprob[0, 0]) == pytest.approx(float(expected[int(token[0, 0])]))


def test_a_tokenizer_of_another_policy_is_refused(loaded):
    encoder = loaded.engine.encoder
    for change, words in (
        ({"video_token_id": 7}, "<|video_pad|> is .* and config.json's 7"),
        ({"image_token_id": 7}, "<|image_pad|> is .* and config.json's 7"),
        ({"text": replace(encoder.model.text, vocab_size=96)}, "1656 tokens and config.json a vocab_size of 96"),
    ):
        with pytest.raises(InputError, match=re.sub("[|]", "[|]", words)):
            replace(encoder, model=replace(encoder.model, **change))


def test_only_the_end_of_a_turn_ends_an_answer(loaded):
    """The published generation_config names the end of a text too, behind which no second turn could follow."""
    sampling, tokenizer = loaded.engine.sampling, loaded.engine.encoder.tokenizer
    ends = json.loads((loaded.folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sampling.end_token == ends[0] and ends[1] in sampling.forbidden


def test_long_queries_and_descriptions_are_cut_to_their_slots(loaded, capsys):
    encoder = loaded.engine.encoder
    query = "where is it? " * 800
    encoded, slots = encoder.prefix(query, 8, 2.0), encoder.chain.query_tokens
    assert 0 <= (~encoded.mask).sum() < 4  # as much of it as fits, but for words that lost their end
    assert "'where is it? where" in encoder.turn1_prompt(query, 8, 2.0)
    said = capsys.readouterr().err
    assert said.count("revseg: warning:") == 1 and f"query_tokens={slots}: the end of a query is left out" in said
    encoded = encoder.turn2("an object " * 500, 10)
    assert encoded.mask.sum() <= encoder.layout.turn2_prompt
    with pytest.raises(InputError, match="chain.query_tokens=3 is too small: the prompt needs"):
        replace(encoder, chain=replace(encoder.chain, query_tokens=3)).prefix("it", 8, 2.0)


class CountingPolicy:
    """Features that show which images were encoded, and a list of how many at a time."""

    remat = "none"

    def __init__(self):
        self.rounds = []

    def encode(self, frames):
        jax.debug.callback(self.rounds.append, frames.shape[0])
        return frames.astype(jnp.float32).reshape(len(frames), 2, -1)


def test_a_keyframe_chosen_several_times_is_encoded_once():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 255, (3, 4, 2, 2, 3), np.uint8)
    index = np.array([[0, 0, 1, 0], [-1, 0, 0, -1], [0, 0, 0, 0]], np.int32)
    policy = CountingPolicy()
    features = np.asarray(jax.jit(lambda *arrays: encode_keyframes(policy, *arrays))(images, index))
    jax.effects_barrier()
    assert [int(count) for count in policy.rounds] == [3, 3]  # two rounds of one image a prompt, not four
    for b, g in np.argwhere(index >= 0):
        np.testing.assert_array_equal(features[b, g].reshape(2, 2, 3), images[b, index[b, g]])


def test_keyframes_are_those_the_rollouts_chose(loaded, sampled):
    prompts, batch, chains = sampled
    for b, row in enumerate(chains):
        chosen = {rollout.turn1.frame_idx for rollout in row if rollout.turn1.ok}
        assert batch.keyframe_index[b].max() == len(chosen) - 1
        for g, rollout in enumerate(row):
            assert (batch.keyframe_index[b, g] >= 0) == rollout.turn1.ok
            if rollout.turn1.ok:
                expected = resize_square(decode_frame(prompts[b].jpegs[rollout.turn1.frame_idx]), 168)
                np.testing.assert_array_equal(batch.keyframes[b, batch.keyframe_index[b, g]], expected)


def test_keyframes_are_decoded_by_several_threads(loaded, sampled, monkeypatch):
    prompts, batch, chains = sampled
    meeting, calls = threading.Barrier(2, timeout=30), itertools.count()

    def decode(jpeg: bytes, size: int) -> np.ndarray:
        if next(calls) < 2:  # neither of the first two goes on without the other
            meeting.wait()
        return decode_square(jpeg, size)

    monkeypatch.setattr(phases, "cores", lambda: 2)
    monkeypatch.setattr(phases, "decode_square", decode)
    turns = [[rollout.turn1 if rollout.turn1.ok else None for rollout in row] for row in chains]
    images, index = loaded.engine._keyframes(prompts, turns)
    np.testing.assert_array_equal(images, batch.keyframes)
    np.testing.assert_array_equal(index, batch.keyframe_index)


def test_draws_are_those_of_jax_random_categorical():
    keys = rollout_keys(3, 0, np.arange(4), 8)
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 8, 500))
    config = SamplingConfig(1.0, 1.0, 0, end_token=1, pad_token=0, forbidden=())
    expected = jax.vmap(jax.vmap(jax.random.categorical))(keys, logits)
    np.testing.assert_array_equal(draw(logits, keys, config)[0], expected)
    assert len(np.unique(expected)) > 10


def test_the_first_of_equal_scores_is_the_largest():
    scores = np.array([[1, 3, 2, 3], [5, 0, 0, 0], [0, 0, 0, 7], [np.nan] * 4, [-np.inf, -np.inf, -1, -1]], np.float32)
    assert first_largest(jnp.array(scores)).tolist() == scores.argmax(-1).tolist() == [1, 0, 3, 0, 2]
