"""Rewards against the method's formulas worked by hand, their gates, presets and baselines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revseg_jax.chain.parsing import Turn1, Turn2
from revseg_jax.config import ChainConfig, RewardsConfig
from revseg_jax.rewards.format import format_reward
from revseg_jax.rewards.mask import mask_reward
from revseg_jax.rewards.overlong import overlong_penalty
from revseg_jax.rewards.scoring import overlong_penalties
from revseg_jax.rewards.spatial import box_iou, spatial_reward
from revseg_jax.rewards.temporal import best_constant_keyframe, random_visible_keyframe, soft_scores, temporal_reward
from revseg_jax.rewards.total import PAPER_CURVES, PAPER_TEXT, RewardWeights, combine, score_rollout, weights_from
from revseg_jax.rollout.chains import Rollout

GOOD1 = Turn1(True, 2, "a red circle", 1.0, "")
GOOD2 = Turn2(True, (0.0, 0.0, 10.0, 10.0), 0.8, "")
BAD1 = Turn1(False, None, "", 0.4, "no object")
BAD2 = Turn2(False, None, 0.5, "no box")

AREAS = np.array([0, 100, 300, 400], np.float32)  # absent in the first frame
BOXES = np.array([[0, 0, 0, 0], [0, 0, 10, 10], [0, 0, 20, 15], [0, 0, 20, 20]], np.float32)
TOTAL = RewardsConfig(preset="paper_text", mask=0.5)


# ---------------------------------------------------------------- temporal


def test_soft_temporal_by_hand() -> None:
    assert soft_scores(AREAS).tolist() == [0, 0.25, 0.75, 1]
    assert soft_scores(np.array([200, 500, 800])).tolist() == [0, 0.5, 1]  # the smallest visible one earns nothing
    assert temporal_reward("soft", 2, AREAS) == 0.75


def test_equal_areas_earn_one_where_visible() -> None:
    assert soft_scores(np.array([50.0, 50.0])).tolist() == [1, 1]
    assert soft_scores(np.array([7.0])).tolist() == [1]
    assert soft_scores(np.zeros(3)).tolist() == [0, 0, 0]
    assert soft_scores(np.zeros(0)).tolist() == []


def test_temporal_kinds() -> None:
    assert [temporal_reward("binary", k, AREAS) for k in range(4)] == [0, 1, 1, 1]
    assert [temporal_reward("none", k, AREAS) for k in range(4)] == [0, 0, 0, 0]
    for kind in ("none", "binary", "soft"):
        assert [temporal_reward(kind, k, AREAS) for k in (-1, 4, None)] == [0, 0, 0]
    with pytest.raises(ValueError, match="hard"):
        temporal_reward("hard", 0, AREAS)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 9.0]), min_size=1, max_size=9), st.floats(0.1, 1e4))
def test_soft_temporal_properties(areas: list[float], scale: float) -> None:
    areas = np.array(areas)
    scores = soft_scores(areas)
    assert ((scores >= 0) & (scores <= 1)).all() and (scores[areas == 0] == 0).all()
    assert scores == pytest.approx(soft_scores(areas * scale))  # resolution does not matter
    assert scores[areas.argmax()] == (1 if areas.any() else 0)
    assert (np.diff(scores[np.argsort(areas)]) >= 0).all()  # a larger object never scores less


def test_baselines_by_hand() -> None:
    clips = np.array([[0, 100, 300, 400], [400, 0, 100, 0], [0, 0, 0, 0]], np.float32)
    # Scores: 0 .25 .75 1 | 1 0 .25 0 | 0 0 0 0, so columns 0, 2 and 3 all sum to 1 and the first wins.
    assert best_constant_keyframe(clips) == (pytest.approx(1 / 3), 0)
    assert random_visible_keyframe(clips) == pytest.approx((2 / 3 + 0.625 + 0) / 3)
    ragged = [np.array([400.0, 100.0]), np.array([0.0, 100.0, 300.0, 400.0]), np.array([1.0, 2.0, 5.0])]
    # Scores: 1 0 | 0 .25 .75 1 | 0 .25 1; the third index is the best, and the short clip loses by it.
    assert best_constant_keyframe(ragged) == (pytest.approx(1.75 / 3), 2)


def test_baselines_are_what_such_policies_earn() -> None:
    rng = np.random.default_rng(0)
    clips = [rng.choice([0.0, 1.0, 2.0, 3.0], rng.integers(2, 7)) for _ in range(40)]
    constant = [np.mean([temporal_reward("soft", k, clip) for clip in clips]) for k in range(7)]
    assert best_constant_keyframe(clips)[0] == pytest.approx(max(constant))
    drawn = []
    for clip in clips:
        visible = np.flatnonzero(clip)
        drawn.append(np.mean([temporal_reward("soft", k, clip) for k in visible]) if len(visible) else 0)
    assert random_visible_keyframe(clips) == pytest.approx(np.mean(drawn))


# ---------------------------------------------------------------- spatial


def test_iou_by_hand() -> None:
    assert box_iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert box_iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert box_iou([0, 0, 10, 10], [20, 20, 30, 30]) == 0  # apart in both directions
    assert box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0
    assert box_iou([[0, 0, 10, 10], [0, 0, 5, 10]], [0, 0, 10, 10]).tolist() == [1, 0.5]


BOX = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(BOX, BOX)
def test_iou_counts_pixels(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Of boxes with integer corners, the IoU is that of the sets of pixels they cover."""
    masks = np.zeros((2, 24, 24), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (a, b), strict=True):
        mask[y1:y2, x1:x2] = True
    assert box_iou(a, b) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())


def test_spatial_kinds() -> None:
    truth = (0, 0, 10, 10)
    half, more = (0, 0, 10, 5), (0, 0, 10, 5.1)
    assert (spatial_reward("threshold", half, truth), spatial_reward("threshold", more, truth)) == (0, 1)  # over 0.5
    assert spatial_reward("iou", half, truth) == pytest.approx(0.5)
    for kind in ("threshold", "iou"):
        assert spatial_reward(kind, None, truth) == 0
        assert spatial_reward(kind, half, (0, 0, 0, 0)) == 0  # absent from the keyframe
    with pytest.raises(ValueError, match="giou"):
        spatial_reward("giou", half, truth)


# ---------------------------------------------------------------- format, mask


def test_format_is_the_mean_of_both_turns() -> None:
    assert format_reward(GOOD1, GOOD2) == pytest.approx(0.9)
    assert format_reward(BAD1, None) == pytest.approx(0.2)


def test_mask_kinds() -> None:
    assert (mask_reward("j", 0.5, 0.9), mask_reward("jf", 0.5, 0.9)) == (0.5, pytest.approx(0.7))
    with pytest.raises(ValueError, match="dice"):
        mask_reward("dice", 0.5)


# ---------------------------------------------------------------- total


def test_presets() -> None:
    assert weights_from(RewardsConfig(preset="paper_text")) == PAPER_TEXT == RewardWeights(1, 1, 1, 0)
    assert weights_from(RewardsConfig(preset="paper_curves")) == PAPER_CURVES == RewardWeights(0.25, 0.15, 0.6, 0)
    # The published curve is half of the preset's total.
    assert combine(PAPER_CURVES, 0.8, 0.4, 0.3, 0, True, True) / 2 == pytest.approx(
        0.125 * 0.8 + 0.075 * 0.4 + 0.3 * 0.3
    )
    custom = RewardsConfig(preset="custom", format=0.1, temporal=0.2, spatial=0.3, mask=0.4)
    assert weights_from(custom) == RewardWeights(0.1, 0.2, 0.3, 0.4)
    assert weights_from(RewardsConfig(preset="custom", format=0.1)) == RewardWeights(0.1, 0, 0, 0)
    assert weights_from(RewardsConfig(preset="paper_curves", mask=0.4)) == RewardWeights(0.25, 0.15, 0.6, 0.4)


def test_gates() -> None:
    weights = RewardWeights(1, 10, 100, 1000)
    ok1, ok2 = np.array([False, False, True, True]), np.array([False, True, False, True])
    ones = np.ones(4)
    assert combine(weights, ones, ones, ones, ones, ok1, ok2).tolist() == [1, 1, 11, 1111]


def test_a_whole_chain() -> None:
    """Box 20 x 15 at the keyframe against an answer of 20 x 10: IoU 2/3."""
    reward = score_rollout(TOTAL, GOOD1, GOOD2, (0, 0, 20, 10), AREAS, BOXES, j=0.6, f=0.4)
    assert (reward.format, reward.temporal, reward.spatial, reward.mask) == pytest.approx((0.9, 0.75, 1, 0.6))
    assert reward.total == pytest.approx(0.9 + 0.75 + 1 + 0.5 * 0.6)
    assert reward.turn1 == pytest.approx(0.5 + 0.75)
    assert reward.turn2 == pytest.approx(0.4 + 1 + 0.3)
    assert reward.turns == 2
    kinds = RewardsConfig(preset="paper_text", temporal_kind="binary", spatial_kind="iou", mask_kind="jf", mask=1)
    reward = score_rollout(kinds, GOOD1, GOOD2, (0, 0, 20, 10), AREAS, BOXES, j=0.6, f=0.4)
    assert (reward.temporal, reward.spatial, reward.mask) == pytest.approx((1, 2 / 3, 0.5))


def test_a_failed_first_turn_earns_its_format_alone() -> None:
    reward = score_rollout(TOTAL, BAD1, None, None, AREAS, BOXES, j=0.6)
    assert (reward.temporal, reward.spatial, reward.mask, reward.turns) == (0, 0, 0, 1)
    assert reward.total == reward.turn1 == pytest.approx(0.2) and reward.turn2 == 0


@pytest.mark.parametrize(("turn2", "box"), [(BAD2, None), (GOOD2, None)])  # GOOD2 with a box outside the image
def test_a_failed_second_turn_keeps_the_first_ones_reward(turn2: Turn2, box: None) -> None:
    reward = score_rollout(TOTAL, GOOD1, turn2, box, AREAS, BOXES, j=0.6)
    assert (reward.temporal, reward.spatial, reward.mask, reward.turns) == (0.75, 0, 0, 2)
    assert reward.turn1 == pytest.approx(0.5 + 0.75) and reward.turn2 == pytest.approx(turn2.format_score / 2)


def test_the_only_turn_of_a_chain_earns_all_of_it() -> None:
    two = score_rollout(TOTAL, GOOD1, GOOD2, (0, 0, 20, 10), AREAS, BOXES, j=0.6)
    one = score_rollout(TOTAL, GOOD1, replace(GOOD2, in_first=True), (0, 0, 20, 10), AREAS, BOXES, j=0.6)
    assert one == replace(two, turns=1, turn1=two.total, turn2=0.0, task1=two.total, task2=0.0)


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 3), BOX)
def test_turns_add_up_and_success_never_costs(
    f1: float, f2: float, ok1: bool, ok2: bool, frame: int, box: tuple[int, ...]
) -> None:
    turn1 = Turn1(ok1, frame if ok1 else None, "d" if ok1 else "", f1, "" if ok1 else "x")
    turn2 = Turn2(ok2, box if ok2 else None, f2, "" if ok2 else "x") if ok1 else None
    for preset in ("paper_text", "paper_curves"):
        config = RewardsConfig(preset=preset, mask=0.3)
        reward = score_rollout(config, turn1, turn2, box if ok1 and ok2 else None, AREAS, BOXES, j=0.5)
        assert reward.turn1 + reward.turn2 == pytest.approx(reward.total)
        assert reward.total >= weights_from(config).format * reward.format - 1e-12
        assert 0 <= reward.total <= 3.3


# ---------------------------------------------------------------- overlong


def test_overlong_penalty_by_hand() -> None:
    """Limit 100 with a buffer of 20: nothing up to 80, then linear to -1."""
    lengths = (0, 79, 80, 85, 90, 100)
    assert [overlong_penalty(n, 100, 20) for n in lengths] == pytest.approx([0, 0, 0, -0.25, -0.5, -1])
    assert overlong_penalty(100, 100, 0) == 0


def test_each_turn_pays_for_its_own_length() -> None:
    config, chain = (
        replace(TOTAL, overlong_tokens=10, overlong_penalty=0.5),
        ChainConfig(turn1_tokens=40, turn2_tokens=100),
    )
    rollout = Rollout("", "", GOOD1, GOOD2, (0, 0, 20, 10), True, tokens1=38, tokens2=95)
    penalties = overlong_penalties(config, chain, rollout)
    assert penalties == (-0.375, -0.25)  # over the last 8 of 40 tokens, a fifth of them, and the last 10 of 100
    assert overlong_penalties(replace(config, overlong_tokens=0), chain, rollout) == (0, 0)
    reward = score_rollout(config, GOOD1, GOOD2, (0, 0, 20, 10), AREAS, BOXES, j=0.6, overlong=penalties)
    plain = score_rollout(config, GOOD1, GOOD2, (0, 0, 20, 10), AREAS, BOXES, j=0.6)
    assert reward.turn1 == pytest.approx(plain.turn1 - 0.375) and reward.turn2 == pytest.approx(plain.turn2 - 0.25)
    assert reward.total == pytest.approx(plain.total - 0.625) and reward.overlong == -0.625
