"""The jitted update: the loss of a rollout batch, gradients by microbatches, optimiser steps by minibatches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from revseg_jax.config import LearnerConfig
from revseg_jax.learner.experience import Experience, Scores
from revseg_jax.learner.forward import suffix_hidden, token_logprobs
from revseg_jax.learner.losses import policy_losses, token_weights, value_losses
from revseg_jax.learner.ppo import init_critic, token_values
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.layout import SlotLayout


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      trained: the policy's parameters that learn
      optimizer: optax state
      step: int32 scalar, training steps done
      critic: PPO's critic, its parameters and their optax state; empty without one
    """

    trained: Any
    optimizer: Any
    step: jax.Array
    critic: Any = ()


def make_optimizer(config: LearnerConfig, learning_rate: float) -> optax.GradientTransformation:
    warmup = optax.schedules.linear_schedule(0.0, learning_rate, max(config.warmup_steps, 1))
    schedule = warmup if config.warmup_steps else learning_rate
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), adam)


def make_learner(graphdef: nnx.GraphDef, config: LearnerConfig, layout: SlotLayout) -> Learner:
    optimizers = (make_optimizer(config, rate) for rate in (config.learning_rate, config.ppo.learning_rate))
    return Learner(graphdef, config, layout, *optimizers)


@dataclass(frozen=True)
class Learner:
    """The jitted functions of the update, for one policy structure, config and layout of the slots."""

    graphdef: nnx.GraphDef
    config: LearnerConfig
    layout: SlotLayout
    optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation

    def init(self, trained: Any) -> TrainState:
        critic = ()
        if self.config.algorithm == "ppo":
            parameters = init_critic(self.config.ppo.critic, trained, trained["text"]["embedding"][...].shape[-1])
            critic = (parameters, jax.jit(self.critic_optimizer.init)(parameters))
        return TrainState(trained, jax.jit(self.optimizer.init)(trained), jnp.int32(0), critic)

    def score(self, state: TrainState, reference: Any, frozen: Any, batch: RolloutBatch) -> Scores:
        """What the models say about the sampled tokens. reference: like `state.trained`; not used when `kl` is off."""
        config = self.config
        return Scores(
            # Sampler and trainer agree in float32, so the policy is asked again only when the difference is corrected.
            old_logprobs=self.logprobs(state.trained, frozen, batch) if config.importance_cap else batch.logprobs,
            reference_logprobs=self.logprobs(reference, frozen, batch) if config.kl != "off" else None,
            values=self.values(state, frozen, batch) if config.algorithm == "ppo" else None,
        )

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, trained: Any, frozen: Any, batch: RolloutBatch) -> jax.Array:
        """float32 [B, G, S] of the suffix tokens under a policy."""

        def of_part(part: RolloutBatch) -> jax.Array:
            policy = nnx.merge(self.graphdef, trained, frozen)
            return token_logprobs(policy, suffix_hidden(policy, part), part.tokens, self.config.logprob_chunk)[0]

        return join(jax.lax.map(of_part, split(batch, self._microbatches(batch))))

    @partial(jax.jit, static_argnums=0)
    def values(self, state: TrainState, frozen: Any, batch: RolloutBatch) -> jax.Array:
        """float32 [B, G, S] of the states before the suffix tokens under the critic."""
        critic = state.critic[0]

        def of_part(part: RolloutBatch) -> jax.Array:
            trunk = nnx.merge(self.graphdef, critic.get("trunk", state.trained), frozen)
            return token_values(critic, suffix_hidden(trunk, part))

        return join(jax.lax.map(of_part, split(batch, self._microbatches(batch))))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(self, state: TrainState, frozen: Any, experience: Experience) -> tuple[TrainState, dict[str, jax.Array]]:
        """A training step: `epochs` passes over the rollouts, each of `minibatches` optimiser steps on whole groups.

        Returns the new state and scalar metrics, means over the optimiser steps; `logprob_gap` and `logprob_gap_mean`
        are the largest and the mean difference between sampler and trainer, seen before the first of them.
        """
        minibatches = split(experience, self.config.minibatches)

        def epoch(state, _):
            return jax.lax.scan(lambda state, part: self._optimizer_step(state, frozen, part), state, minibatches)

        state, metrics = jax.lax.scan(epoch, state, length=self.config.epochs)
        gaps = {name: metrics.pop(name)[0, 0] for name in ("logprob_gap", "logprob_gap_mean")}
        metrics = {name: value.mean() for name, value in metrics.items()} | gaps
        return state._replace(step=state.step + 1), metrics

    def _optimizer_step(
        self, state: TrainState, frozen: Any, experience: Experience
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # The weights are those of the whole minibatch: microbatches then simply add up.
        generated = experience.batch.generated
        weights = token_weights(generated, self.config.aggregation, self.layout.turn1 + self.layout.turn2)
        parameters = (state.trained, state.critic[0] if state.critic else ())

        def accumulate(total, part):
            (_, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(parameters, frozen, *part)
            return jax.tree.map(jnp.add, total, gradients), metrics

        parts = split((experience, weights), self._microbatches(generated))
        gradients, metrics = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, parameters), parts)
        gap = metrics.pop("logprob_gap").max()
        metrics = {name: value.sum() / (1.0 if name == "loss" else weights.sum()) for name, value in metrics.items()}
        metrics |= {"logprob_gap": gap, "gradient_norm": optax.tree.norm(gradients[0])}

        updates, optimizer = self.optimizer.update(gradients[0], state.optimizer, state.trained)
        trained, critic = optax.apply_updates(state.trained, updates), state.critic
        if critic:
            updates, critic_optimizer = self.critic_optimizer.update(gradients[1], critic[1], critic[0])
            critic = (optax.apply_updates(critic[0], updates), critic_optimizer)
        return TrainState(trained, optimizer, state.step, critic), metrics

    def loss(
        self, parameters: tuple[Any, Any], frozen: Any, experience: Experience, weights: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and metrics, weighted sums over tokens. parameters: the policy's trained ones and the critic's;
        weights: float32 [B, G, S] of `token_weights`."""
        config, batch, scores = self.config, experience.batch, experience.scores
        trained, critic = parameters
        policy = nnx.merge(self.graphdef, trained, frozen)
        hidden = suffix_hidden(policy, batch)
        logprobs, entropy = token_logprobs(policy, hidden, batch.tokens, config.logprob_chunk)
        losses, metrics = policy_losses(
            config,
            logprobs,
            entropy,
            scores.old_logprobs,
            batch.logprobs,
            scores.reference_logprobs,
            experience.advantages,
            batch.generated,
        )
        gaps = jnp.where(batch.generated, jnp.abs(logprobs - batch.logprobs), 0.0)
        metrics |= {"loss": losses, "logprob_gap_mean": gaps}
        if critic:
            seen = hidden
            if "trunk" in critic:
                seen = suffix_hidden(nnx.merge(self.graphdef, critic["trunk"], frozen), batch)
            values = token_values(critic, seen)
            metrics["value_loss"] = value_losses(config.ppo, values, scores.values, experience.returns)
        metrics = {name: (weights * value).sum() for name, value in metrics.items()}
        loss = metrics["loss"]
        if critic:
            loss = loss + config.ppo.value_coefficient * metrics["value_loss"]
        metrics["logprob_gap"] = gaps.max()
        return loss, metrics

    def _microbatches(self, like: RolloutBatch | jax.Array) -> int:
        """Into how many parts the prompts go, one part being in memory at a time."""
        prompts = jax.tree.leaves(like)[0].shape[0]
        return prompts // (self.config.prompts_per_microbatch or prompts)


def split(tree: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]. Part i takes the prompts i, i + parts, ...: each device splits what
    it holds, and none has to send its prompts to another."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join(array: jax.Array) -> jax.Array:
    """The inverse of `split` for one array."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
