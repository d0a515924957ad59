"""Advantages, losses and PPO against NumPy references written from their definitions; the update against itself."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revseg_jax.config import LearnerConfig, PPOConfig, load_config
from revseg_jax.learner import update as update_module
from revseg_jax.learner.advantages import turn_advantages
from revseg_jax.learner.experience import Experience, Scores, make_experience
from revseg_jax.learner.forward import suffix_hidden
from revseg_jax.learner.kl import kl_estimate
from revseg_jax.learner.losses import policy_losses, token_weights, value_losses
from revseg_jax.learner.ppo import generalised_advantages, token_rewards, whiten
from revseg_jax.learner.reference import fetch_reference, store_reference
from revseg_jax.learner.update import make_learner
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.policy.vision import window_layout
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.layout import SlotLayout
from revseg_jax.rollout.loading import load_engine
from revseg_jax.rollout.sampling import rollout_keys
from tests.test_rollout import make_prompts, whole_sequence

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
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


# ---- The update -----------------------------------------------------------------------------------------------------

ADVANTAGES = np.array([[1.0, -1.0, 0.5, -0.5], [0.0, 2.0, -1.0, -1.0]])


@pytest.fixture(scope="module")
def step():
    """A learner's config and a batch of 2 prompts x 4 rollouts; the last prompt's video has 5 frames."""
    config = load_config(CONFIG, ["run.dir=none"])
    loaded = load_engine(config)
    keys = rollout_keys(3, 0, np.arange(2), 4)
    prompts = make_prompts(1) + make_prompts(1, frames=5)
    batch, _ = loaded.engine.sample((loaded.trained, loaded.frozen), prompts, keys)
    return replace(config.learner, aggregation="token_mean", importance_cap=2.0), loaded, batch


def updated(config, step, times=1, rows=slice(None)):
    """The learner, its state after updates on some of the prompts, and the metrics of each of them."""
    _, loaded, batch = step
    learner = make_learner(loaded.engine.graphdef, config, loaded.engine.encoder.layout)
    state = learner.init(jax.tree.map(jnp.copy, loaded.trained))
    state, metrics = update(learner, state, loaded, batch, times, rows)
    return learner, state, metrics


def update(learner, state, loaded, batch, times=1, rows=slice(None)):
    batch, history = RolloutBatch(*(array[rows] for array in batch)), []
    rewards = np.stack([np.zeros_like(ADVANTAGES), ADVANTAGES], -1)[rows]
    scores = learner.score(state, loaded.trained, loaded.frozen, batch)
    experience = make_experience(learner.config, learner.layout, batch, scores, rewards)
    for _ in range(times):
        state, metrics = learner.update(state, loaded.frozen, experience)
        history.append(metrics)
    return state, history


def assert_same_parameters(a, b, atol, outliers=0.0):
    """outliers: the share that may differ by more. Adam makes whole steps, of any sign, of gradients that are noise."""
    differences = [np.abs(np.asarray(x) - y).ravel() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    assert np.mean(np.concatenate(differences) > atol) <= outliers


def test_updates_that_are_not_finite_are_left_out_and_counted(step):
    """By minibatches of one prompt: what is wrong with one prompt does not keep the other from teaching."""
    config, loaded, batch = step
    learner = make_learner(loaded.engine.graphdef, replace(config, minibatches=2), loaded.engine.encoder.layout)
    state = learner.init(jax.tree.map(jnp.copy, loaded.trained))
    scores = learner.score(state, loaded.trained, loaded.frozen, batch)
    rewards = np.stack([np.zeros_like(ADVANTAGES), ADVANTAGES], -1)
    experience = make_experience(learner.config, learner.layout, batch, scores, rewards)

    def after(state, prompts, factor):
        scale = np.ones((2, 1, 1), np.float32)
        scale[prompts] = factor
        before = jax.tree.map(np.array, (state.trained, state.optimizer))
        state, metrics = learner.update(
            state, loaded.frozen, experience._replace(advantages=experience.advantages * scale)
        )
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves((state.trained, state.optimizer)), strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained))
        return state, same, (int(metrics["skipped_updates"]), int(state.bad_steps), int(state.step))

    state, same, counts = after(state, [0, 1], np.nan)
    assert same and counts == (2, 1, 1)
    state, same, counts = after(state, [0, 1], 1e30)  # the loss is finite, the norm of its gradient is not
    assert same and counts == (2, 2, 2)
    state, same, counts = after(state, [1], np.nan)
    assert not same and counts == (1, 3, 3)
    state, same, counts = after(state, [], 1)
    assert not same and counts == (0, 0, 4)

    # Nothing was generated, and nothing is divided by nothing.
    nothing = experience._replace(batch=batch._replace(generated=np.zeros_like(batch.generated)))
    state, metrics = learner.update(state, loaded.frozen, nothing)
    assert all(np.isfinite(value) for value in metrics.values()) and int(metrics["skipped_updates"]) == 0


def test_update_follows_the_advantages(step):
    config, loaded, batch = step
    learner, state, (metrics,) = updated(config, step)
    before = learner.logprobs(loaded.trained, loaded.frozen, batch)
    after = learner.logprobs(state.trained, loaded.frozen, batch)
    change = (np.asarray(after - before) * batch.generated).sum(-1)
    assert (change * ADVANTAGES).sum() > 0
    assert float(metrics["logprob_gap"]) < 2e-5  # the largest of all tokens; float32 resolves a logprob of -10 to 1e-6
    assert float(metrics["kl"]) < 1e-9
    assert int(state.step) == 1


def test_microbatches_give_the_same_update(step):
    config, _, _ = step
    _, whole, (metrics,) = updated(config, step)
    _, parts, (again,) = updated(replace(config, prompts_per_microbatch=1), step)
    # Adam's first step is a sign: tiny gradients may round.
    assert_same_parameters(whole.trained, parts.trained, 2e-5, outliers=1e-5)
    for name in metrics:
        assert float(again[name]) == pytest.approx(float(metrics[name]), rel=1e-3, abs=2e-5), name


def test_epochs_and_minibatches_are_optimiser_steps_one_after_the_other(step):
    config, loaded, batch = step
    config = replace(config, importance_cap=0.0)  # else each call below would take its own policy for the old one
    _, state, _ = updated(replace(config, epochs=2, minibatches=2), step)
    learner = make_learner(loaded.engine.graphdef, config, loaded.engine.encoder.layout)
    manual = learner.init(jax.tree.map(jnp.copy, loaded.trained))
    for row in (0, 1, 0, 1):
        manual, _ = update(learner, manual, loaded, batch, rows=slice(row, row + 1))
    # From a wrong old policy nine in ten differ.
    assert_same_parameters(state.trained, manual.trained, 1e-5, outliers=1e-4)
    assert int(state.step) == 1


def test_the_critic_learns_what_comes_and_leaves_the_policy_alone(step):
    config, loaded, _ = step
    ppo = PPOConfig(learning_rate=3e-4, value_clip=0.0)
    config = replace(config, algorithm="ppo", kl="off", learning_rate=0.0, importance_cap=0.0, ppo=ppo)
    _, state, history = updated(config, step, times=16)
    losses = [float(metrics["value_loss"]) for metrics in history]
    assert (np.diff(losses) < 0).all() and losses[-1] < 0.9 * losses[0]
    assert_same_parameters(state.trained, loaded.trained, 0.0)


@pytest.fixture(scope="module")
def critic(step):
    """A learner with a critic, config far from the defaults, and a state whose critic's head answers something."""
    config, loaded, _ = step
    ppo = PPOConfig(value_clip=0.1, value_coefficient=1.7)
    config = replace(config, algorithm="ppo", kl="off", importance_cap=0.0, ppo=ppo)
    learner = make_learner(loaded.engine.graphdef, config, loaded.engine.encoder.layout)
    state = learner.init(loaded.trained)
    parameters, optimizer = state.critic
    kernel = np.random.default_rng(6).normal(size=parameters["head"]["kernel"].shape).astype(np.float32)
    parameters = parameters | {"head": {"kernel": 0.1 * kernel, "bias": np.float32(0.3)}}
    return learner, state._replace(critic=(parameters, optimizer))


def test_values_are_the_trunks_of_the_states_before_the_tokens(step, critic):
    _, loaded, batch = step
    learner, state = critic
    values = np.asarray(learner.values(state, loaded.frozen, batch))
    slot = np.flatnonzero(batch.generated[0, 0])[3]
    tokens = np.array(batch.tokens)
    tokens[0, 0, slot] = next(token for token in tokens[0, 0, slot - 3 : slot] if token != tokens[0, 0, slot])
    moved = np.abs(np.asarray(learner.values(state, loaded.frozen, batch._replace(tokens=tokens))) - values)
    assert moved[0, 0, slot + 1] > 1e-3
    moved[0, 0, slot + 1 :] = 0
    assert moved.max() < 1e-5

    other = jax.tree.map(lambda x: 1.1 * x, state.trained)
    same = learner.values(state._replace(trained=other), loaded.frozen, batch)
    np.testing.assert_array_equal(same, values)
    changed = state._replace(critic=(state.critic[0] | {"trunk": other}, state.critic[1]))
    assert np.abs(np.asarray(learner.values(changed, loaded.frozen, batch)) - values).max() > 1e-3


def test_ppos_loss_equals_its_definition(step, critic):
    _, loaded, batch = step
    learner, state = critic
    config, generated = learner.config, np.asarray(batch.generated)
    rng = np.random.default_rng(7)
    values = np.asarray(learner.values(state, loaded.frozen, batch))
    logprobs = np.asarray(learner.logprobs(state.trained, loaded.frozen, batch))
    old = (logprobs + 0.3 * rng.normal(size=values.shape)).astype(np.float32)
    old_values, returns = (values + 0.5 * rng.normal(size=(2, *values.shape))).astype(np.float32)
    advantages = rng.normal(size=values.shape).astype(np.float32)

    experience = Experience(batch, Scores(old, None, old_values), advantages, returns)
    weights = token_weights(jnp.asarray(generated), config.aggregation, 0)
    ours, _ = jax.jit(learner.loss)((state.trained, state.critic[0]), loaded.frozen, experience, weights)

    nothing = np.zeros(values.shape)
    policy = numpy_loss(config, logprobs, nothing, old, batch.logprobs, nothing, advantages, generated, 0)
    near = np.clip(values, old_values - 0.1, old_values + 0.1)
    errors = np.maximum((values - returns) ** 2, (near - returns) ** 2)[generated] / 2
    assert float(ours) == pytest.approx(policy + 1.7 * errors.mean(), rel=1e-4)


def test_scoring_takes_as_many_prompts_at_a_time_as_the_update(step, critic, monkeypatch):
    _, loaded, batch = step
    sizes = []

    def noted(policy, part):
        sizes.append(part.tokens.shape[0])
        return suffix_hidden(policy, part)

    monkeypatch.setattr(update_module, "suffix_hidden", noted)
    config = replace(critic[0].config, minibatches=2, prompts_per_microbatch=0)
    learner = make_learner(loaded.engine.graphdef, config, loaded.engine.encoder.layout)
    for score, parameters in ((learner.logprobs, loaded.trained), (learner.values, critic[1])):
        assert jax.eval_shape(score, parameters, loaded.frozen, batch).shape == batch.tokens.shape
    assert sizes == [1, 1]


def test_the_upper_bound_of_dapo_clips(step):
    """Its preset takes several steps a batch; at the first one the ratio is 1 but for the sampler's rounding."""
    config = load_config([CONFIG, CONFIG.with_name("dapo.yaml")], ["run.dir=none"]).learner
    _, _, (metrics,) = updated(replace(config, clip_low=1.0, clip_high=1e-3), step, rows=np.array([0, 1, 0, 1]))
    assert float(metrics["clip_fraction"]) > 0


def test_the_reference_may_live_in_bfloat16_and_in_host_memory(step):
    _, loaded, _ = step
    trained = loaded.trained["text"]["layers"]["mlp"]
    assert store_reference("device", trained) is trained
    small, hosted = store_reference("bfloat16", trained), store_reference("host", trained)
    fetched = fetch_reference("host", hosted)
    for a, b, c, d in zip(*map(jax.tree.leaves, (trained, small, hosted, fetched)), strict=True):
        assert {x.dtype for x in (b, c, d)} == {jnp.bfloat16.dtype}
        assert [x.sharding.memory_kind for x in (b, c, d)] == ["device", "pinned_host", "device"]
        np.testing.assert_allclose(np.asarray(d, np.float32), a, rtol=2**-8)


@contextmanager
def in_float64():
    """JAX remembers the type that a NumPy constant had in its first program: the vision tower needs fresh ones."""
    window_layout.cache_clear()
    try:
        with jax.enable_x64(True):
            yield
    finally:
        window_layout.cache_clear()


def test_shared_prefix_loss_equals_that_of_separate_sequences_in_float64(step):
    """Value and every gradient, with ragged lengths, padded prefixes and a rollout whose first turn failed."""
    config, loaded, batch = step
    layout = loaded.engine.encoder.layout
    batch = RolloutBatch(*(np.array(array) for array in batch))
    batch.mask[0, 1, layout.turn2_prompt_start :] = batch.generated[0, 1, layout.turn2_prompt_start :] = False
    batch.keyframe_index[0, 1] = -1
    for b, g in np.ndindex(2, 4):  # cut short by 0 to 3 tokens
        batch.mask[b, g, np.flatnonzero(batch.generated[b, g])[-g:][:g]] = False
    batch = batch._replace(generated=batch.generated & batch.mask)
    assert len({int(row.sum()) for row in batch.mask.reshape(8, -1)}) > 3 and not batch.prefix_mask.all()
    rng = np.random.default_rng(4)
    old = batch.logprobs + 0.1 * rng.normal(size=batch.logprobs.shape)
    reference = batch.logprobs + 0.1 * rng.normal(size=batch.logprobs.shape)
    rows = [(b, g) for b in range(2) for g in range(4)]
    wholes = [whole_sequence(batch, b, g) for b, g in rows]
    length = max(len(tokens) for tokens, _ in wholes)
    config = replace(config, kl_coefficient=0.05, aggregation="token_mean", logprob_chunk=100)

    with in_float64():
        policy = load_policy("embedded", "float64", "float64").policy
        graphdef, trained = nnx.split(policy)
        learner = make_learner(graphdef, config, layout)
        advantages = np.broadcast_to(ADVANTAGES[..., None], batch.logprobs.shape)
        scores = Scores(old, reference, None)
        experience = make_experience(config, layout, batch, scores, np.stack([ADVANTAGES] * 2, -1))
        experience = experience._replace(advantages=advantages)
        weights = token_weights(jnp.asarray(batch.generated), "token_mean", 0)
        shared = jax.jit(jax.value_and_grad(lambda p: learner.loss((p, ()), nnx.State({}), experience, weights)[0]))

        def separate(trained):
            policy = nnx.merge(graphdef, trained)
            tokens = np.stack([np.pad(tokens, (0, length - len(tokens))) for tokens, _ in wholes])
            positions = np.stack([np.pad(at, ((0, 0), (0, length - at.shape[1]))) for _, at in wholes], 1)
            videos = policy.encode(batch.frames[[b for b, _ in rows]])
            images = policy.encode(np.stack([batch.keyframes[b, batch.keyframe_index[b, g]] for b, g in rows])[:, None])
            # The n-th visual token takes the n-th feature: a short video leaves its last features out.
            shown = [int((tokens[i] == policy.config.video_token_id).sum()) for i in range(8)]
            features = [jnp.concatenate([videos[i, : shown[i]], images[i], videos[i, shown[i] :]]) for i in range(8)]
            hidden, _, _ = policy.prefix_forward(tokens, positions, jnp.stack(features))
            logprobs = jax.nn.log_softmax(policy.text.logits(hidden))
            total = 0.0
            for i, (b, g) in enumerate(rows):
                slots = np.flatnonzero(batch.generated[b, g])
                skipped = len(wholes[i][0]) - int(batch.mask[b, g].sum())
                places = skipped + np.cumsum(batch.mask[b, g])[slots] - 1
                new = logprobs[i, places - 1, tokens[i, places]]
                ratio, d = jnp.exp(new - old[b, g, slots]), reference[b, g, slots] - new
                a = ADVANTAGES[b, g]
                trust = np.minimum(np.exp(old[b, g, slots] - batch.logprobs[b, g, slots]), 2.0)
                gain = trust * jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
                total += jnp.sum(0.05 * (jnp.exp(d) - d - 1) - gain)
            return total * weights.max()

        value, gradients = shared(trained)
        expected, oracle = jax.jit(jax.value_and_grad(separate))(trained)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(oracle), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
