"""The jitted update: log-probabilities of a rollout batch, the loss, gradients by microbatches, an optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from revseg_jax.config import LearnerConfig
from revseg_jax.learner.losses import grpo_loss
from revseg_jax.policy.model import Policy, chunked_logprobs
from revseg_jax.rollout.batch import RolloutBatch


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      trained: the policy's parameters that learn
      optimizer: optax state
      step: int32 scalar, updates done
    """

    trained: Any
    optimizer: Any
    step: jax.Array


def make_optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    warmup = optax.schedules.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    schedule = warmup if config.warmup_steps else config.learning_rate
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), adam)


def batch_logprobs(policy: Policy, batch: RolloutBatch, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, G, S] of every suffix token given all before it; slot 0 gets 0."""
    video = policy.encode(batch.frames)
    prefix = policy.prefill(batch.prefix_tokens, jnp.moveaxis(batch.prefix_positions, 1, 0), batch.prefix_mask, video)
    prompts, group = batch.tokens.shape[:2]
    images = policy.encode(batch.keyframes.reshape(prompts * group, 1, *batch.keyframes.shape[2:]))
    images = images.reshape(prompts, group, *images.shape[1:])
    hidden = policy.suffix_hidden(prefix, batch.tokens, jnp.moveaxis(batch.positions, 2, 0), batch.mask, images)
    logprobs, entropy = chunked_logprobs(policy, hidden[:, :, :-1], batch.tokens[:, :, 1:], chunk)
    first = ((0, 0), (0, 0), (1, 0))
    return jnp.pad(logprobs, first), jnp.pad(entropy, first)


@dataclass(frozen=True)
class Learner:
    """The jitted functions of the update, for one policy structure and config."""

    graphdef: nnx.GraphDef
    config: LearnerConfig
    optimizer: optax.GradientTransformation

    def init(self, trained: Any) -> TrainState:
        return TrainState(trained, jax.jit(self.optimizer.init)(trained), jnp.int32(0))

    @partial(jax.jit, static_argnums=0)
    def reference_logprobs(self, trained: Any, frozen: Any, batch: RolloutBatch) -> jax.Array:
        """float32 [B, G, S] under the reference policy."""
        policy = nnx.merge(self.graphdef, trained, frozen)
        return batch_logprobs(policy, batch, self.config.logprob_chunk)[0]

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self, state: TrainState, frozen: Any, batch: RolloutBatch, reference: jax.Array, advantages: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step on a batch of rollouts.

        reference: float32 [B, G, S] from `reference_logprobs`; advantages: float32 [B, G]. Gradients are accumulated
        over microbatches of whole groups. Returns the new state and scalar metrics.
        """
        config = self.config
        prompts = batch.tokens.shape[0]
        size = config.prompts_per_microbatch or prompts
        parts = jax.tree.map(lambda x: x.reshape(prompts // size, size, *x.shape[1:]), (batch, reference, advantages))

        def loss_fn(trained, part):
            batch, reference, advantages = part
            policy = nnx.merge(self.graphdef, trained, frozen)
            logprobs, entropy = batch_logprobs(policy, batch, config.logprob_chunk)
            loss, metrics = grpo_loss(
                logprobs,
                batch.logprobs,
                reference,
                advantages,
                batch.generated,
                config.clip_low,
                config.clip_high,
                config.kl_coefficient,
            )
            tokens = jnp.maximum(batch.generated.sum(), 1)
            gap = jnp.abs(logprobs - batch.logprobs) * batch.generated
            metrics |= {
                "loss": loss,
                "entropy": (entropy * batch.generated).sum() / tokens,
                "logprob_gap": gap.max(),
            }
            return loss, metrics

        def accumulate(total, part):
            (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained, part)
            return jax.tree.map(lambda a, b: a + b * size / prompts, total, gradients), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        gradients, metrics = jax.lax.scan(accumulate, zeros, parts)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {name: value.max() if name == "logprob_gap" else value.mean() for name, value in metrics.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return TrainState(trained, optimizer, state.step + 1), metrics
