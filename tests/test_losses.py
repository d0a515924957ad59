"""Advantages, KL, losses and PPO against NumPy references written from their definitions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax.config import LearnerConfig, PPOConfig
from revseg_jax.learner.advantages import turn_advantages
from revseg_jax.learner.experience import Scores, make_experience
from revseg_jax.learner.kl import kl_estimate
from revseg_jax.learner.losses import policy_losses, token_weights, value_losses
from revseg_jax.learner.ppo import generalised_advantages, token_rewards, whiten
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.layout import SlotLayout

LAYOUT = SlotLayout(prefix=5, turn1=3, turn2_prompt=2, turn2=2)


# ---- Advantages -----------------------------------------------------------------------------------------------------


def numpy_advantages(values, kind):
    """One group's, [n]."""
    if kind == "grpo":
        return (values - values.mean()) / (values.std() + 1e-6)
    if kind == "dr_grpo":
        return values - values.mean()
    others = [np.delete(values, i) for i in range(len(values))]
    return np.array([v - (o.mean() if len(o) else v) for v, o in zip(values, others, strict=True)])


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_equal_their_definitions(kind, credit):
    rng = np.random.default_rng(1)
    second = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    rewards = rng.random((4, 4, 2)) * np.stack([np.ones_like(second), second], -1)
    ours = turn_advantages(rewards, second, kind, credit)
    for b in range(4):
        first = numpy_advantages(rewards[b].sum(-1), kind)
        np.testing.assert_allclose(ours[b, :, 0], first, rtol=1e-5, atol=1e-6)
        if credit == "trajectory":
            np.testing.assert_array_equal(ours[b, :, 0], ours[b, :, 1])
            continue
        taken = second[b]
        np.testing.assert_array_equal(ours[b, ~taken, 1], 0)
        if taken.any():
            expected = numpy_advantages(rewards[b, taken, 1], kind)
            np.testing.assert_allclose(ours[b, taken, 1], expected, rtol=1e-5, atol=1e-6)


def test_groups_without_spread_have_no_advantage():
    rewards = np.full((1, 5, 2), 0.1)  # 0.2 is not the float64 mean of five 0.2s
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert np.abs(turn_advantages(rewards, np.ones((1, 5), bool), kind, "turn")).max() < 1e-9


# ---- KL -------------------------------------------------------------------------------------------------------------


def test_kl_estimators_average_to_what_they_estimate():
    """Over all outcomes of a categorical distribution, not over samples."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        logits, reference = rng.normal(size=(2, 6))
        q = np.exp(reference) / np.exp(reference).sum()

        def kl(logits):
            p = jax.nn.softmax(logits)
            return jnp.sum(p * (jnp.log(p) - np.log(q)))

        def reverse_kl(logits):
            return jnp.sum(q * (np.log(q) - jax.nn.log_softmax(logits)))

        def mean(kind, logits):
            """The average estimate; sampling is not differentiated, as in a loss on sampled tokens."""
            chances = jax.lax.stop_gradient(jax.nn.softmax(logits))
            return jnp.sum(chances * kl_estimate(kind, jax.nn.log_softmax(logits), jnp.log(q)))

        for kind in ("k1", "k3"):
            np.testing.assert_allclose(mean(kind, logits), kl(logits), rtol=1e-12)
        wanted = {"k1": np.zeros(6), "k2": jax.grad(kl)(logits), "k3": jax.grad(reverse_kl)(logits)}
        for kind, gradient in wanted.items():
            np.testing.assert_allclose(jax.grad(lambda x, k=kind: mean(k, x))(logits), gradient, atol=1e-12)


# ---- The policy's loss ----------------------------------------------------------------------------------------------


def numpy_loss(config, logprobs, entropy, old, sampler, reference, advantages, generated, limit):
    """One rollout and one token at a time."""
    losses, rollouts, tokens = [], 0, 0
    for b, g in np.ndindex(*generated.shape[:2]):
        places = np.flatnonzero(generated[b, g])
        sequence = np.exp(np.mean([logprobs[b, g, t] - old[b, g, t] for t in places]))  # GSPO, equation 7
        rollout = []
        for t in places:
            ratio = sequence if config.ratio == "sequence" else np.exp(logprobs[b, g, t] - old[b, g, t])
            advantage = advantages[b, g, t]
            gain = min(ratio * advantage, np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage)
            if config.dual_clip and advantage < 0:
                gain = max(gain, config.dual_clip * advantage)
            if config.importance_cap:
                gain *= min(np.exp(old[b, g, t] - sampler[b, g, t]), config.importance_cap)
            d = reference[b, g, t] - logprobs[b, g, t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - d - 1}[config.kl_estimator]
            beta = config.kl_coefficient if config.kl == "loss" else 0
            rollout.append(-gain + beta * kl - config.entropy_coefficient * entropy[b, g, t])
        losses.append(rollout)
        rollouts, tokens = rollouts + 1, tokens + len(places)
    if config.aggregation == "sequence_mean":
        return np.mean([np.mean(rollout) for rollout in losses])
    return sum(map(sum, losses)) / (tokens if config.aggregation == "token_mean" else rollouts * limit)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.5, "kl_coefficient": 0.05},
        {"aggregation": "token_mean", "kl": "off"},
        {"aggregation": "constant", "kl_estimator": "k1", "kl_coefficient": 0.3},
        {"kl_estimator": "k2", "kl_coefficient": 0.3},
        {"dual_clip": 1.5, "kl": "reward"},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
        {"importance_cap": 1.2, "entropy_coefficient": 0.1},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_loss_and_gradient_equal_their_definition(options):
    config = replace(LearnerConfig(), **options)
    rng = np.random.default_rng(0)
    shape, limit = (2, 3, 7), 6
    generated = rng.random(shape) < 0.6
    generated[..., 0], generated[..., 6] = True, False
    logprobs, old, sampler, reference = -rng.exponential(1.0, shape) + 0.3 * rng.normal(size=(4, *shape))
    entropy = rng.random(shape)
    advantages = np.broadcast_to(rng.normal(size=(2, 3, 1)), shape)

    def numpy_value(logprobs):
        return numpy_loss(config, logprobs, entropy, old, sampler, reference, advantages, generated, limit)

    def value(logprobs):
        given = (logprobs, entropy, old, sampler, None if config.kl == "off" else reference, advantages, generated)
        losses, _ = policy_losses(config, *(None if array is None else jnp.asarray(array) for array in given))
        return jnp.sum(losses * token_weights(jnp.asarray(generated), config.aggregation, limit))

    with jax.enable_x64(True):
        ours, gradient = jax.value_and_grad(value)(jnp.asarray(logprobs))
    assert float(ours) == pytest.approx(numpy_value(logprobs), rel=1e-6)  # the weights are float32
    for index in np.ndindex(*shape):
        step = np.zeros(shape)
        step[index] = 1e-6
        slope = (numpy_value(logprobs + step) - numpy_value(logprobs - step)) / 2e-6
        assert float(gradient[index]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_padding_gets_no_gradient_even_where_it_is_infinite():
    generated = jnp.array([[[True, False]]])

    def loss(logprobs):
        old = jnp.array([[[-1.0, -200.0]]])
        config = LearnerConfig(importance_cap=2.0)
        losses, _ = policy_losses(
            config, logprobs, jnp.zeros((1, 1, 2)), old, old, 400 + old, jnp.ones((1, 1, 2)), generated
        )
        return jnp.sum(losses * token_weights(generated, "sequence_mean", 2))

    gradient = jax.grad(loss)(jnp.array([[[-1.0, -1.0]]]))
    assert gradient[0, 0, 1] == 0


# ---- PPO ------------------------------------------------------------------------------------------------------------


def test_values_are_clipped_around_the_old_ones():
    values, old, returns = jnp.array([1.0, 1.0, 0.3]), jnp.array([0.5, 0.5, 0.2]), jnp.array([2.0, 0.9, 0.0])
    # Kept within 0.2: 0.7, 0.7, 0.3. The larger error counts: the clipped one, the clipped one, both the same.
    expected = np.array([1.3**2, 0.2**2, 0.3**2]) / 2
    np.testing.assert_allclose(value_losses(PPOConfig(), values, old, returns), expected, rtol=1e-5)
    unclipped = value_losses(PPOConfig(value_clip=0.0), values, old, returns)
    np.testing.assert_allclose(unclipped, np.array([1.0, 0.1**2, 0.3**2]) / 2, rtol=1e-5)


def test_rewards_stand_at_the_ends_of_turns():
    #          slot 0 | turn 1 | prompt | turn 2
    generated = [[[0, 1, 1, 0, 0, 0, 1, 0], [0, 1, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0]]]
    generated = jnp.array(generated, bool)
    rewards = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]])
    penalty = jnp.full((1, 3, 8), 0.1)
    expected = [[0, 0, 1, 0, 0, 0, 2, 0], [0, 0, 0, 3, 0, 0, 0, 4], [0, 5, 0, 0, 0, 0, 0, 0]]
    ours = token_rewards(rewards, None, generated, LAYOUT.turns)
    np.testing.assert_array_equal(ours[0], expected)
    ours = token_rewards(rewards, penalty, generated, LAYOUT.turns)
    np.testing.assert_allclose(ours[0], expected - 0.1 * np.array(generated[0]), rtol=1e-6)


def test_advantages_run_over_both_turns_by_hand():
    """Two tokens of turn 1, which earns 1, and one of turn 2, which earns 2; discount 0.5, lambda 0.5."""
    generated = jnp.array([[[0, 1, 1, 0, 0, 0, 1, 0]]], bool)
    rewards = jnp.array([[[0, 0, 1.0, 0, 0, 0, 2.0, 0]]])
    values = jnp.array([[[9, 0.5, 1.0, 9, 9, 9, 3.0, 9]]])
    # From the end: 2 - 3 = -1; 1 + .5 * 3 - 1 = 1.5, and 1.5 + .25 * -1 = 1.25; 0 + .5 * 1 - .5 = 0, and .25 * 1.25.
    expected = [0, 0.3125, 1.25, 0, 0, 0, -1.0, 0]
    np.testing.assert_allclose(generalised_advantages(rewards, values, generated, 0.5, 0.5)[0, 0], expected)


def test_advantages_equal_their_definition_over_both_turns():
    rng = np.random.default_rng(5)
    shape, gamma, lam = (3, 4, LAYOUT.suffix), 0.97, 0.8
    generated = rng.random(shape) < 0.6
    generated[..., 0] = False
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    ours = np.asarray(generalised_advantages(*map(jnp.asarray, (rewards, values, generated)), gamma, lam))
    for b, g in np.ndindex(3, 4):
        places = np.flatnonzero(generated[b, g])
        later = np.append(values[b, g, places[1:]], 0.0)
        deltas = rewards[b, g, places] + gamma * later - values[b, g, places]
        expected = [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(places))]
        np.testing.assert_allclose(ours[b, g, places], expected, rtol=1e-4, atol=1e-5)
    assert (ours[~generated] == 0).all()
    white = np.asarray(whiten(jnp.asarray(ours), jnp.asarray(generated)))[generated]
    expected = (ours[generated] - ours[generated].mean()) / ours[generated].std()
    np.testing.assert_allclose(white, expected, rtol=1e-4, atol=1e-5)


# ---- Experience -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_batch():
    """1 prompt x 3 rollouts in LAYOUT, the last without a second turn; only what experience is made of is filled."""
    rng = np.random.default_rng(8)
    generated = np.zeros((1, 3, 8), bool)
    generated[0, 0, [1, 2, 6]] = generated[0, 1, [1, 2, 3, 6, 7]] = generated[0, 2, [1, 2]] = True
    logprobs, reference, values = (generated * -rng.random((3, 1, 3, 8))).astype(np.float32)
    empty = dict.fromkeys(RolloutBatch._fields, np.zeros(0))
    batch = RolloutBatch(**empty | {"generated": generated, "logprobs": logprobs})
    rewards = np.array([[[0.5, 0.25], [1.0, 0.75], [0.0, 0.0]]])
    return batch, Scores(logprobs, reference, values), rewards


def test_kl_in_the_reward_is_taken_from_each_turn(small_batch):
    batch, scores, rewards = small_batch
    config = LearnerConfig(kl="reward", kl_estimator="k1", kl_coefficient=0.2, advantage="dr_grpo", credit="turn")
    ours = make_experience(config, LAYOUT, batch, scores, rewards).advantages
    kl = scores.old_logprobs - scores.reference_logprobs
    earned = rewards - 0.2 * np.stack([kl[..., :4].sum(-1), kl[..., 4:].sum(-1)], -1)
    total = earned.sum(-1)[0]
    np.testing.assert_allclose(ours[0, :, 1], total - total.mean(), rtol=1e-5)
    second = earned[0, :2, 1]
    np.testing.assert_allclose(ours[0, :2, 6], second - second.mean(), rtol=1e-5, atol=1e-7)
    assert ours[0, 2, 6] == 0


def test_grpo_divides_by_the_deviation_of_the_rewards_without_the_kl(small_batch):
    batch, scores, rewards = small_batch
    config = LearnerConfig(kl="reward", kl_estimator="k1", kl_coefficient=0.2, credit="turn")
    kl = scores.old_logprobs - scores.reference_logprobs
    earned = rewards - 0.2 * np.stack([kl[..., :4].sum(-1), kl[..., 4:].sum(-1)], -1)
    ours = make_experience(config, LAYOUT, batch, scores, rewards).advantages
    total, second = earned.sum(-1)[0], earned[0, :2, 1]
    np.testing.assert_allclose(ours[0, :, 1], (total - total.mean()) / rewards.sum(-1).std(), rtol=1e-5)
    np.testing.assert_allclose(ours[0, :2, 6], (second - second.mean()) / rewards[0, :2, 1].std(), rtol=1e-5)
    # Rewards to go that are all equal, of all rollouts and of those with a second turn: no KL makes up for them.
    equal = np.array([[[0.5, 0.25], [0.5, 0.25], [0.75, 0.0]]])
    for credit in ("turn", "trajectory"):
        same = replace(config, credit=credit)
        assert not make_experience(same, LAYOUT, batch, scores, equal).advantages.any()
        assert make_experience(replace(same, advantage="rloo"), LAYOUT, batch, scores, equal).advantages.any()


def test_ppo_whitens_the_advantages_of_generated_tokens(small_batch):
    batch, scores, rewards = small_batch
    config = LearnerConfig(algorithm="ppo", kl="off")
    ours = np.asarray(make_experience(config, LAYOUT, batch, scores, rewards).advantages)
    assert not ours[~batch.generated].any()
    np.testing.assert_allclose([ours[batch.generated].mean(), ours[batch.generated].std()], [0, 1], atol=1e-5)


def test_ppo_puts_the_kl_on_every_token(small_batch):
    batch, scores, rewards = small_batch
    ppo = PPOConfig(gae_lambda=1.0, whiten=False)
    config = LearnerConfig(algorithm="ppo", kl="reward", kl_estimator="k1", kl_coefficient=0.2, ppo=ppo)
    ours = make_experience(config, LAYOUT, batch, scores, rewards)
    kl = 0.2 * (scores.old_logprobs - scores.reference_logprobs) * batch.generated
    for g in range(3):
        for t in np.flatnonzero(batch.generated[0, g]):
            # lambda 1, discount 1: the return is all that is earned from this token on.
            to_go = rewards[0, g, 1] + (rewards[0, g, 0] if t < 4 else 0) - kl[0, g, t:].sum()
            assert float(ours.returns[0, g, t]) == pytest.approx(to_go, abs=1e-6)
            assert float(ours.advantages[0, g, t]) == pytest.approx(to_go - scores.values[0, g, t], abs=1e-6)
