"""What the loss needs to know of a step's rollouts, all of it computed before the first update."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.config import LearnerConfig
from revseg_jax.learner.advantages import turn_advantages
from revseg_jax.learner.kl import kl_estimate
from revseg_jax.learner.ppo import generalised_advantages, token_rewards, whiten
from revseg_jax.parallel.rows import own_rows
from revseg_jax.rollout.batch import Array, RolloutBatch
from revseg_jax.rollout.layout import SlotLayout


class Scores(NamedTuple):
    """What the models say about the sampled tokens; needs no rewards. All float32 [B, G, S].

    Attributes:
      old_logprobs: under the policy before the step
      reference_logprobs: under the frozen reference; None when no KL is wanted
      values: the critic's, of the state before each token; None without a critic
    """

    old_logprobs: Array
    reference_logprobs: Array | None
    values: Array | None


class Experience(NamedTuple):
    """Attributes:
    batch: the rollouts
    scores: what the models said about them
    advantages: float32 [B, G, S]
    returns: float32 [B, G, S], what the critic should have said; None without a critic
    """

    batch: RolloutBatch
    scores: Scores
    advantages: Array
    returns: Array | None


def make_experience(
    config: LearnerConfig, layout: SlotLayout, batch: RolloutBatch, scores: Scores, rewards: Array
) -> Experience:
    """rewards: float [B, G, 2], what each turn earned; grpo's on the host and of this process's prompts (so are the
    advantages), ppo's of all prompts, as the other arrays are."""
    penalty = None
    if config.kl == "reward":
        estimate = kl_estimate(config.kl_estimator, scores.old_logprobs, scores.reference_logprobs)
        penalty = config.kl_coefficient * jnp.where(batch.generated, estimate, 0.0)
    if config.algorithm == "ppo":
        advantages, returns = _estimated(
            config, layout, batch.generated, scores.values, penalty, jnp.asarray(rewards, jnp.float32)
        )
        return Experience(batch, scores, advantages, returns)
    if penalty is not None:
        penalty = own_rows(penalty) @ np.eye(2)[layout.turns]
    second = own_rows(batch.generated)[:, :, layout.turn2_start :].any(-1)
    advantages = turn_advantages(rewards, second, config.advantage, config.credit, penalty)[:, :, layout.turns]
    return Experience(batch, scores, advantages, None)


@partial(jax.jit, static_argnums=(0, 1))
def _estimated(
    config: LearnerConfig,
    layout: SlotLayout,
    generated: jax.Array,
    values: jax.Array,
    penalty: jax.Array | None,
    rewards: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    of_tokens = token_rewards(rewards, penalty, generated, layout.turns)
    advantages = generalised_advantages(of_tokens, values, generated, config.ppo.discount, config.ppo.gae_lambda)
    returns = jnp.where(generated, advantages + values, 0.0)
    return whiten(advantages, generated) if config.ppo.whiten else advantages, returns
