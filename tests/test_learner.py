"""The update against itself, by hand, and against separate sequences in float64."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revseg_jax.config import PPOConfig, load_config
from revseg_jax.learner import update as update_module
from revseg_jax.learner.experience import Experience, Scores, make_experience
from revseg_jax.learner.forward import suffix_hidden
from revseg_jax.learner.losses import token_weights
from revseg_jax.learner.reference import fetch_reference, store_reference
from revseg_jax.learner.update import make_learner
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.policy.vision import window_layout
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.loading import load_engine
from revseg_jax.rollout.sampling import rollout_keys
from tests.test_losses import numpy_loss
from tests.test_rollout import make_prompts, whole_sequence

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
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
