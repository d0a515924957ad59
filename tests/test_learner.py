"""The learner against NumPy references written from the definitions."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax.config import load_config
from revseg_jax.learner.advantages import group_advantages
from revseg_jax.learner.losses import grpo_loss
from revseg_jax.learner.update import Learner, make_optimizer
from revseg_jax.rollout.loading import load_engine
from revseg_jax.rollout.sampling import rollout_keys
from tests.test_rollout import make_prompts

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"


def test_advantages_are_standardised_within_the_group():
    rewards = np.array([[0.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages[0], np.array([-1, 0, 0, 1]) * np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(advantages[1], 0)


def numpy_grpo(logprobs, old, reference, advantages, generated, low, high, beta):
    """Equation 3 of arXiv 2402.03300, one rollout and one token at a time."""
    losses = []
    for b, g in np.ndindex(*advantages.shape):
        tokens = []
        for t in np.flatnonzero(generated[b, g]):
            ratio = np.exp(logprobs[b, g, t] - old[b, g, t])
            gain = min(ratio * advantages[b, g], np.clip(ratio, 1 - low, 1 + high) * advantages[b, g])
            d = reference[b, g, t] - logprobs[b, g, t]
            tokens.append(beta * (np.exp(d) - d - 1) - gain)
        losses.append(np.mean(tokens))
    return np.mean(losses)


def test_grpo_loss_equals_its_definition():
    rng = np.random.default_rng(0)
    shape = (2, 3, 7)
    logprobs, old, reference = (-rng.exponential(1.0, shape) for _ in range(3))
    generated = rng.random(shape) < 0.6
    generated[..., 0] = True
    advantages = rng.normal(size=shape[:2])
    loss, _ = grpo_loss(*map(jnp.array, (logprobs, old, reference, advantages, generated)), 0.2, 0.3, 0.05)
    expected = numpy_grpo(logprobs, old, reference, advantages, generated, 0.2, 0.3, 0.05)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_padding_gets_no_gradient_even_where_it_is_infinite():
    generated = jnp.array([[[True, False]]])

    def loss(logprobs):
        old = jnp.array([[[-1.0, -200.0]]])
        return grpo_loss(logprobs, old, old, jnp.ones((1, 1)), generated, 0.2, 0.2, 0.1)[0]

    gradient = jax.grad(loss)(jnp.array([[[-1.0, -1.0]]]))
    assert np.isfinite(gradient).all() and gradient[0, 0, 0] == -1.0 and gradient[0, 0, 1] == 0


@pytest.fixture(scope="module")
def step():
    """A learner and a batch of 2 prompts x 4 rollouts."""
    config = load_config(CONFIG)
    loaded = load_engine(config)
    keys = rollout_keys(3, 0, np.arange(2), 4)
    batch, _ = loaded.engine.sample((loaded.trained, loaded.frozen), make_prompts(2), keys)
    advantages = np.array([[1.0, -1.0, 0.5, -0.5], [0.0, 2.0, -1.0, -1.0]], np.float32)
    return config.learner, loaded, batch, advantages


def run_update(config, loaded, batch, advantages):
    learner = Learner(loaded.engine.graphdef, config, make_optimizer(config))
    state = learner.init(jax.tree.map(jnp.copy, loaded.trained))
    reference = learner.reference_logprobs(loaded.trained, loaded.frozen, batch)
    state, metrics = learner.update(state, loaded.frozen, batch, reference, advantages)
    return learner, state, metrics


def test_update_follows_the_advantages(step):
    config, loaded, batch, advantages = step
    learner, state, metrics = run_update(config, loaded, batch, advantages)
    before = learner.reference_logprobs(loaded.trained, loaded.frozen, batch)
    after = learner.reference_logprobs(state.trained, loaded.frozen, batch)
    change = (np.asarray(after - before) * batch.generated).sum(-1)
    assert (change * advantages).sum() > 0
    assert float(metrics["logprob_gap"]) < 2e-5  # the largest of all tokens; float32 resolves a logprob of -10 to 1e-6
    assert float(metrics["kl"]) < 1e-9
    assert int(state.step) == 1


def test_microbatches_give_the_same_update(step):
    config, loaded, batch, advantages = step
    _, whole, _ = run_update(config, loaded, batch, advantages)
    _, parts, _ = run_update(replace(config, prompts_per_microbatch=1), loaded, batch, advantages)
    for a, b in zip(jax.tree.leaves(whole.trained), jax.tree.leaves(parts.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # Adam's first step is a sign: tiny gradients may round either way
