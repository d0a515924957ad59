"""Losses of single tokens and the weights by which they add up. All arrays are [B, G, S]: prompts, rollouts, slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from revseg_jax.config import LearnerConfig, PPOConfig
from revseg_jax.learner.kl import kl_estimate


def token_weights(generated: jax.Array, aggregation: str, limit: int) -> jax.Array:
    """Weights float32 [B, G, S] with which token losses add up to the loss; 0 where bool `generated` is False.

    "sequence_mean": the mean over each rollout's tokens, then over rollouts (GRPO); "token_mean": the mean over all
    tokens (DAPO, arXiv 2503.14476, section 3.3); "constant": every token 1 / (rollouts x limit), `limit` being the most
    tokens a rollout can have, so that no length is favoured (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    weights = generated.astype(jnp.float32)
    rollouts = generated.shape[0] * generated.shape[1]
    if aggregation == "token_mean":
        return weights / jnp.maximum(weights.sum(), 1)
    length = limit if aggregation == "constant" else jnp.maximum(weights.sum(-1, keepdims=True), 1)
    return weights / (length * rollouts)


def policy_losses(
    config: LearnerConfig,
    logprobs: jax.Array,
    entropy: jax.Array,
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    reference_logprobs: jax.Array | None,
    advantages: jax.Array,
    generated: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of every token, and metrics by token; what stands where `generated` is False is finite and means nothing.

    logprobs and entropy are the policy's, old_logprobs those of the policy before the step, sampler_logprobs those that
    the sampler saw, reference_logprobs those of the frozen reference (None: no KL). The clipped surrogate is that of
    PPO (arXiv 1707.06347, equation 7) with two clip bounds (DAPO) and, as the config says, GSPO's sequence ratio
    (arXiv 2507.18071, equation 7; in the per-token form of its section 4.3), the dual clip (arXiv 1912.09729, equation
    5) and truncated importance weights min(old / sampler, cap) for what sampler and trainer disagree about.
    """
    log_ratio = jnp.where(generated, logprobs - old_logprobs, 0.0)
    if config.ratio == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(generated.sum(-1, keepdims=True), 1)
        log_ratio = jax.lax.stop_gradient(mean - log_ratio) + log_ratio
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = {"clip_fraction": (gain < ratio * advantages).astype(jnp.float32)}
    if config.dual_clip:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, config.dual_clip * advantages), gain)
    if config.importance_cap:
        difference = jnp.where(generated, old_logprobs - sampler_logprobs, 0.0)
        gain = gain * jax.lax.stop_gradient(jnp.minimum(jnp.exp(difference), config.importance_cap))
    loss = -gain
    metrics["entropy"] = jnp.where(generated, entropy, 0.0)
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * metrics["entropy"]
    if reference_logprobs is not None:
        same = jnp.where(generated, reference_logprobs, logprobs)  # padding: a difference of 0, never an overflow
        metrics["kl"] = kl_estimate(config.kl_estimator, logprobs, same)
        if config.kl == "loss":
            loss = loss + config.kl_coefficient * metrics["kl"]
    return loss, metrics


def value_losses(config: PPOConfig, values: jax.Array, old_values: jax.Array, returns: jax.Array) -> jax.Array:
    """Squared error of every token's value, halved; with clipping the larger of it and that of the value kept within
    `value_clip` of the old one (as in the reference implementation of PPO)."""
    error = (values - returns) ** 2
    if config.value_clip:
        near = old_values + jnp.clip(values - old_values, -config.value_clip, config.value_clip)
        error = jnp.maximum(error, (near - returns) ** 2)
    return error / 2
