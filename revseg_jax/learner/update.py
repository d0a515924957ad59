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
from revseg_jax.parallel.sharding import Placement, constrain_tree, tree_shardings
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.layout import SlotLayout


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      trained: the policy's parameters that learn
      optimizer: optax state
      step: int32 scalar, training steps done
      critic: PPO's critic, its parameters and their optax state; empty without one
      bad_steps: int32 scalar, how many of the last steps, in a row, left out an update because a loss or gradient was
        not finite
    """

    trained: Any
    optimizer: Any
    step: jax.Array
    critic: Any
    bad_steps: jax.Array


def make_optimizer(config: LearnerConfig, learning_rate: float) -> optax.GradientTransformation:
    warmup = optax.schedules.linear_schedule(0.0, learning_rate, max(config.warmup_steps, 1))
    schedule = warmup if config.warmup_steps else learning_rate
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), adam)


def make_learner(
    graphdef: nnx.GraphDef,
    config: LearnerConfig,
    layout: SlotLayout,
    placement: Placement | None = None,
    temperature: float = 1.0,
) -> Learner:
    """placement: of the state, as of the policy's activations; None for one device. temperature: of sampling, whose
    distribution is the one that learns; greedy answers (0) count as at 1, as in `draw`."""
    optimizers = (make_optimizer(config, rate) for rate in (config.learning_rate, config.ppo.learning_rate))
    return Learner(graphdef, config, layout, *optimizers, placement, temperature or 1.0)


@dataclass(frozen=True)
class Learner:
    """The jitted functions of the update, for one policy structure, config and layout of the slots."""

    graphdef: nnx.GraphDef
    config: LearnerConfig
    layout: SlotLayout
    optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    placement: Placement | None
    temperature: float

    def init(self, trained: Any, donate: bool = False) -> TrainState:
        """A state before any step, every array of it made where it belongs. donate: `trained` goes into it, no copy."""
        shardings = self.shardings(jax.eval_shape(self._init, trained))
        return jax.jit(self._init, out_shardings=shardings, donate_argnums=0 if donate else ())(trained)

    def shardings(self, state: TrainState) -> TrainState | None:
        """Where the arrays of a state, or of its shapes, belong; None without a placement."""
        if self.placement is None:
            return None
        moments = self.placement.with_width("optimizer_width")
        critic = state.critic and (
            tree_shardings(state.critic[0], self.placement),
            tree_shardings(state.critic[1], moments),
        )
        return TrainState(
            tree_shardings(state.trained, self.placement),
            tree_shardings(state.optimizer, moments),
            self.placement.whole,
            critic,
            self.placement.whole,
        )

    def _init(self, trained: Any) -> TrainState:
        critic = ()
        if self.config.algorithm == "ppo":
            parameters = init_critic(self.config.ppo.critic, trained, trained["text"]["embedding"][...].shape[-1])
            critic = (parameters, self.critic_optimizer.init(parameters))
        # A copy, because jit would hand back the caller's own arrays, which the first update would then take away.
        trained = jax.tree.map(jnp.copy, trained)
        return TrainState(trained, self.optimizer.init(trained), jnp.int32(0), critic, jnp.int32(0))

    def score(self, state: TrainState, reference: Any, frozen: Any, batch: RolloutBatch) -> Scores:
        """What the models say about the sampled tokens. reference: like `state.trained`; not used when `kl` is off."""
        config = self.config
        return Scores(
            # Sampler and trainer agree in float32; in bfloat16 by their rounding only, which GSPO's bounds do not bear.
            # The policy is asked again when that difference is corrected.
            old_logprobs=self.logprobs(state.trained, frozen, batch) if config.importance_cap else batch.logprobs,
            reference_logprobs=self.logprobs(reference, frozen, batch) if config.kl != "off" else None,
            values=self.values(state, frozen, batch) if config.algorithm == "ppo" else None,
        )

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, trained: Any, frozen: Any, batch: RolloutBatch) -> jax.Array:
        """float32 [B, G, S] of the suffix tokens under a policy, by as many prompts at a time as in the update."""

        def of_part(part: RolloutBatch) -> jax.Array:
            policy = nnx.merge(self.graphdef, trained, frozen)
            return self._token_logprobs(policy, suffix_hidden(policy, part), part)[0]

        return join(jax.lax.map(of_part, self._scored(batch)))

    @partial(jax.jit, static_argnums=0)
    def values(self, state: TrainState, frozen: Any, batch: RolloutBatch) -> jax.Array:
        """float32 [B, G, S] of the states before the suffix tokens under the critic; by parts, as `logprobs`."""
        critic = state.critic[0]

        def of_part(part: RolloutBatch) -> jax.Array:
            trunk = nnx.merge(self.graphdef, critic.get("trunk", state.trained), frozen)
            return token_values(critic, suffix_hidden(trunk, part))

        return join(jax.lax.map(of_part, self._scored(batch)))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(self, state: TrainState, frozen: Any, experience: Experience) -> tuple[TrainState, dict[str, jax.Array]]:
        """A training step: `epochs` passes over the rollouts, each of `minibatches` optimiser steps on whole groups.

        An optimiser step whose loss or gradient is not finite changes nothing. Returns the new state and scalar
        metrics, means over the optimiser steps, but for `skipped_updates`, their sum, and `logprob_gap` and
        `logprob_gap_mean`, the largest and the mean difference between sampler and trainer in the first minibatch.
        """
        minibatches = split(experience, self.config.minibatches)

        def epoch(state, _):
            return jax.lax.scan(lambda state, part: self._optimizer_step(state, frozen, part), state, minibatches)

        state, metrics = jax.lax.scan(epoch, state, length=self.config.epochs)
        if self.placement is not None:
            state = jax.lax.with_sharding_constraint(state, self.shardings(state))
        skipped = metrics.pop("skipped_updates").sum()
        gaps = {name: metrics.pop(name)[0, 0] for name in ("logprob_gap", "logprob_gap_mean")}
        metrics = {name: value.mean() for name, value in metrics.items()} | gaps | {"skipped_updates": skipped}
        bad_steps = jnp.where(skipped > 0, state.bad_steps + 1, 0)
        return state._replace(step=state.step + 1, bad_steps=bad_steps), metrics

    def _optimizer_step(
        self, state: TrainState, frozen: Any, experience: Experience
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # The weights are those of the whole minibatch: microbatches then simply add up.
        generated = experience.batch.generated
        weights = token_weights(generated, self.config.aggregation, self.layout.turn1 + self.layout.turn2)
        parameters = (state.trained, state.critic[0] if state.critic else ())

        def accumulate(total, part):
            (_, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(parameters, frozen, *part)
            return constrain_tree(self.placement, jax.tree.map(jnp.add, total, gradients)), metrics

        parts = split((experience, weights), self._microbatches(generated.shape[0], 1))
        gradients, metrics = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, parameters), parts)
        gap, tokens = metrics.pop("logprob_gap").max(), jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)
        metrics = {name: value.sum() / (1.0 if name == "loss" else tokens) for name, value in metrics.items()}
        metrics |= {"logprob_gap": gap, "gradient_norm": optax.tree.norm(gradients[0])}

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradients))
        # Chosen element by element, in place: what a condition returns stands beside the state in memory.
        changed = self._apply(state, gradients)
        state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), changed, state)
        return state, metrics | {"skipped_updates": 1 - finite.astype(jnp.int32)}

    def _apply(self, state: TrainState, gradients: tuple[Any, Any]) -> TrainState:
        """An optimiser step. gradients: of the policy's parameters and of the critic's."""
        updates, optimizer = self.optimizer.update(gradients[0], state.optimizer, state.trained)
        trained, critic = optax.apply_updates(state.trained, updates), state.critic
        if critic:
            updates, critic_optimizer = self.critic_optimizer.update(gradients[1], critic[1], critic[0])
            critic = (optax.apply_updates(critic[0], updates), critic_optimizer)
        return state._replace(trained=trained, optimizer=optimizer, critic=critic)

    def loss(
        self, parameters: tuple[Any, Any], frozen: Any, experience: Experience, weights: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and metrics, weighted sums over tokens. parameters: the policy's trained ones and the critic's;
        weights: float32 [B, G, S] of `token_weights`."""
        config, batch, scores = self.config, experience.batch, experience.scores
        trained, critic = parameters
        policy = nnx.merge(self.graphdef, trained, frozen)
        hidden = suffix_hidden(policy, batch)
        logprobs, entropy = self._token_logprobs(policy, hidden, batch)
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

    def _token_logprobs(self, policy: nnx.Module, hidden: jax.Array, batch: RolloutBatch):
        chunk, temperature = self.config.logprob_chunk, self.temperature
        return token_logprobs(policy, hidden, batch.tokens, self.layout.sampled, chunk, temperature)

    def _scored(self, batch: RolloutBatch) -> RolloutBatch:
        """A step's batch in the parts that are scored one after the other."""
        return split(batch, self._microbatches(batch.tokens.shape[0], self.config.minibatches))

    def _microbatches(self, prompts: int, minibatches: int) -> int:
        """Into how many parts the prompts of that many minibatches go, one part being in memory at a time."""
        return prompts // (self.config.prompts_per_microbatch or prompts // minibatches)


def split(tree: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]. Part i takes the prompts i, i + parts, ...: each device splits what
    it holds, and none has to send its prompts to another."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join(array: jax.Array) -> jax.Array:
    """The inverse of `split` for one array."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
