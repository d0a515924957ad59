"""The groups of a training step: what dynamic sampling keeps, what decoding wastes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from child_processes import run_two

from revseg_jax.chain.parsing import Turn1, Turn2
from revseg_jax.config import Config, LearnerConfig, MeshConfig, RewardsConfig, RolloutConfig
from revseg_jax.data.example import Batch, Example, stack
from revseg_jax.groups import (
    Decoded,
    Groups,
    _with_spread,
    have_spread,
    replace_groups_without_spread,
    sample_groups,
)
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.rewards.scoring import PendingRewards
from revseg_jax.rewards.total import RolloutReward, score_rollout
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.sampling import rollout_keys
from revseg_jax.step_metrics import Clock, decode_steps, reward_metrics, rollout_metrics

CONFIG = Config(
    rewards=RewardsConfig(preset="custom", temporal=1.0), rollout=RolloutConfig(prompts_per_step=3, group_size=2)
)


def chain(keyframe: int, tokens1: int = 5, tokens2: int = 3) -> Rollout:
    turn1 = Turn1(True, keyframe, "a thing", 1.0, "")
    return Rollout("", "", turn1, Turn2(True, (0, 0, 1, 1), 1.0, ""), (0, 0, 1, 1), False, tokens1, tokens2)


def example(index: int) -> Example:
    """The object is absent from the first of two frames: keyframe 1 earns 1, keyframe 0 nothing."""
    return Example(
        index=index,
        video_id=f"video{index}",
        expression_id="0",
        query="the thing",
        kind="referring",
        fps=2.0,
        seconds=1.0,
        size=np.array([8, 8], np.int32),
        frames=np.full((2, 4, 4, 3), index, np.uint8),
        frame_count=2,
        sampled=np.arange(2),
        boxes=np.array([[0, 0, 0, 0], [0, 0, 4, 4]], np.float32),
        areas=np.array([0, 16], np.float32),
        jpegs=(b"a", b"b"),
        masks=(None, None),
    )


def groups(first: int, keyframes: list[tuple[int, int]]) -> Groups:
    """Prompts first, first + 1, ...; two rollouts each."""
    batch = stack([example(first + i) for i in range(len(keyframes))])
    chains = [[chain(k) for k in pair] for pair in keyframes]
    pending = [PendingRewards(pair, None) for pair in chains]
    rollouts = RolloutBatch(*(np.repeat(batch.index[:, None], 2, 1) for _ in RolloutBatch._fields))
    return Groups(batch, rollouts, pending, [Decoded(6, (9, 0), 24)])


def replaced(first: Groups, *more: Groups, limit: int = 5, lap=lambda name: None) -> tuple[Groups, int, int]:
    """The result, and how many batches were taken."""
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, resample_limit=limit))
    prepared = {int(g.batch.index[0]): g for g in more}
    batches = iter([g.batch for g in more])
    placement = make_placement(MeshConfig())
    result = replace_groups_without_spread(
        config, placement, first, batches, lambda batch: prepared[int(batch.index[0])], lap
    )
    return *result, len(more) - len(list(batches))


def indices(result: Groups) -> list[int]:
    """Of the prompts, which arrays, chains and rewards must agree on."""
    batch: Batch = result.batch
    assert result.rollouts.tokens[:, 0].tolist() == batch.index.tolist()
    assert len(result.chains) == len(result.rewards(CONFIG)) == len(batch)
    assert all(batch.frames[b].max() == index for b, index in enumerate(batch.index))
    return batch.index.tolist()


def test_groups_without_spread_are_replaced_by_later_ones():
    first = groups(0, [(0, 1), (1, 1), (0, 0)])
    second, third = groups(3, [(1, 1), (0, 1), (0, 0)]), groups(6, [(1, 0), (0, 1), (0, 1)])
    result, count, taken = replaced(first, second, third, groups(9, [(0, 1)] * 3))
    assert indices(result) == [0, 4, 6] and count == 2 and taken == 2
    totals = np.array([[reward.total for reward in row] for row in result.rewards(CONFIG)])
    assert (totals.std(axis=1) > 0).all()
    assert result.decoded == first.decoded * 3


def test_what_replacing_waits_for_is_booked_as_such():
    laps = []
    replaced(groups(0, [(0, 1), (1, 1)]), groups(2, [(0, 1)] * 2), lap=laps.append)
    assert laps == ["reward_wait", "data", "rollout", "reward_wait"]
    clock = Clock()
    for name in ("data", "rollout", "data"):
        before = clock.seconds.get(f"seconds/{name}", 0)
        clock.lap(name)
        assert clock.seconds[f"seconds/{name}"] > before


def test_answers_that_differ_in_length_alone_teach_nothing():
    answer = Turn1(True, 0, "a thing", 1.0, "")

    def earned(areas: list[float], **options) -> RolloutReward:
        return score_rollout(CONFIG.rewards, answer, None, None, np.array(areas), np.ones((2, 4)), **options)

    alike, longer, other = earned([1, 1]), earned([1, 1], overlong=(-0.1, 0.0)), earned([1, 2])
    assert longer.total == pytest.approx(alike.total - 0.1) == longer.turn1 + longer.turn2
    rewards = [[alike, longer], [alike, other], [alike, alike]]
    for credit in ("trajectory", "turn"):
        assert have_spread(rewards, credit).tolist() == [False, True, False]


def test_nothing_is_drawn_when_all_groups_differ():
    first = groups(0, [(0, 1)] * 3)
    result, count, taken = replaced(first, groups(3, [(0, 1)] * 3))
    assert indices(result) == [0, 1, 2] and result.decoded == first.decoded and count == taken == 0


def test_the_limit_leaves_what_could_not_be_replaced():
    first = groups(0, [(1, 1), (0, 0), (0, 1)])
    result, count, taken = replaced(first, groups(3, [(1, 1)] * 3), groups(6, [(0, 1)] * 3), limit=1)
    assert indices(result) == [0, 1, 2] and count == 0 and taken == 1 and len(result.decoded) == 2
    result, count, taken = replaced(first, groups(3, [(1, 1), (0, 1), (1, 1)]), limit=1)
    assert indices(result) == [0, 2, 4] and count == 1 and taken == 1


def test_with_credit_by_turn_a_group_differs_when_either_turn_does(monkeypatch):
    """Equal totals of unequal turns; all equal; an only second turn; what a rollout without one lacks is no spread."""
    by_turn = [[(0.5, 0.5), (0.2, 0.8), (1.0, 0)], [(0.1, 0.2)] * 3, [(1, 0), (0.5, 0.5), (1, 0)],
               [(0.3, 0.3), (0.3, 0.3), (0.6, 0)]]  # fmt: skip
    rewards = [
        [RolloutReward(0, 0, 0, 0, a + b, a, b, turns=2 if b else 1, task1=a, task2=b) for a, b in row]
        for row in by_turn
    ]
    monkeypatch.setattr(Groups, "rewards", lambda groups, config: rewards)
    for credit, useful in (("turn", [0]), ("trajectory", [])):
        config = replace(CONFIG, learner=LearnerConfig(credit=credit))
        found = _with_spread(groups(0, [(0, 1)] * 4), config, make_placement(MeshConfig()))
        assert found == useful
        assert reward_metrics(rewards, credit)["reward/groups_without_spread"] == 1 - len(useful) / 4


TWO_PROCESSES = """
import sys
from concurrent.futures import Future
from child_processes import report
from test_groups import groups, indices, replaced
from revseg_jax.parallel.processes import failing_together
from revseg_jax.parallel.startup import start_processes
from revseg_jax.tracker.connection import SidecarAway

index, away = int(sys.argv[1]), sys.argv[2] == "away"
start_processes()
with failing_together():
    # The first process lacks nothing; the second finds what it lacks in the third batch only.
    first = groups(0, [(0, 1), (1, index), (0, 1)])
    second, third = groups(3, [(1, index)] * 3), groups(6, [(0, 1)] * 3)
    if away and index == 1:
        second.pending[0] = second.pending[0]._replace(scores=Future())
        second.pending[0].scores.set_exception(SidecarAway("the sidecar is gone"))
    try:
        result, count, taken = replaced(first, second, third, groups(9, [(0, 1)] * 3))
        report([indices(result), count, taken, len(result.decoded)])
    except SidecarAway as error:
        report(str(error))
"""


def test_processes_draw_together_until_none_lacks_a_group():
    found = [one for one, errors, status in run_two(TWO_PROCESSES, "all")]
    assert found == [[[0, 1, 2], 0, 2, 3], [[0, 2, 6], 1, 2, 3]]  # and have decoded equally often


def test_a_lost_sidecar_stops_the_drawing_in_all_processes():
    found = [one for one, errors, status in run_two(TWO_PROCESSES, "away")]
    assert found == ["the sidecar is gone"] * 2


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ([(5, 3), (5, 3)], (6 + 4) * 2),  # a step more than the longest: it stores the last token
        ([(9, 0), (2, 4), (5, 1)], (10 + 5) * 3),
        ([(7, 0), (3, 0)], 8 * 2),  # nobody reached turn 2: its loop does not run
    ],
)
def test_decoding_runs_until_the_longest_has_ended(lengths, steps):
    longest = max(first for first, _ in lengths), max(second for _, second in lengths)
    assert decode_steps([[Decoded(len(lengths), longest, 0)]]) == steps


def test_processes_decode_until_the_longest_answer_of_all_has_ended():
    shares = [[Decoded(4, (10, 3), 0), Decoded(4, (5, 0), 0)], [Decoded(4, (50, 0), 0), Decoded(4, (7, 2), 0)]]
    assert decode_steps(shares) == 8 * (51 + 4) + 8 * (8 + 3)


def test_metrics_say_how_many_rollouts_were_truncated():
    first = groups(0, [(0, 1), (1, 1), (0, 0)])
    rows = [[replace(rollout, truncated=g == 0 and b > 0) for g, rollout in enumerate(row)]
            for b, row in enumerate(first.chains)]  # fmt: skip
    first = first._replace(pending=[PendingRewards(row, None) for row in rows])
    metrics = reward_metrics(first.rewards(CONFIG), "trajectory") | rollout_metrics(first)
    assert metrics["rollout/truncated_count"] == 2 and metrics["rollout/truncated"] == pytest.approx(1 / 3)
    assert metrics["reward/groups_without_spread"] == pytest.approx(2 / 3)


class RecordingEngine:
    """Every rollout of a prompt has its number of frames as its tokens, and its query's length as its keyframe."""

    def __init__(self):
        self.parts, self.keys = [], []

    def sample(self, params, prompts, keys):
        self.parts.append([(prompt.frame_count, len(prompt.query)) for prompt in prompts])
        self.keys.append(np.asarray(jax.random.key_data(keys)))
        counts = np.array([[prompt.frame_count] * 2 for prompt in prompts])
        return RolloutBatch(*[counts] * len(RolloutBatch._fields)), [
            [chain(len(prompt.query), prompt.frame_count)] * 2 for prompt in prompts
        ]


def test_prompts_of_similar_length_are_sampled_together_and_come_back_in_their_order():
    frames, queries = [2, 1, 2, 1], ["long query", "b", "abc", "ab"]
    batch = stack([replace(example(i), frame_count=frames[i], query=queries[i]) for i in range(4)])
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, prompts_per_step=4, prompts_per_batch=2))
    engine = RecordingEngine()
    result = sample_groups(config, engine, None, None, 5, batch)
    assert engine.parts == [[(1, 1), (1, 2)], [(2, 3), (2, 10)]]
    expected = np.asarray(jax.random.key_data(rollout_keys(config.run.seed, 5, batch.index, 2)))
    np.testing.assert_array_equal(np.concatenate(engine.keys), expected[[1, 3, 2, 0]])
    assert result.rollouts.tokens[:, 0].tolist() == frames
    assert [row[0].turn1.frame_idx for row in result.chains] == [len(query) for query in queries]
    # Unordered, the two parts would each wait for a long one: (3 + 4) steps of 4 rollouts twice.
    assert decode_steps([result.decoded]) == (2 + 4) * 4 + (3 + 4) * 4
    assert sum(part.tokens for part in result.decoded) == 2 * (sum(frames) + 4 * 3)
