"""The GRPO loss on log-probabilities (DeepSeekMath, arXiv 2402.03300, equations 3 and 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grpo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    reference_logprobs: jax.Array,
    advantages: jax.Array,
    generated: jax.Array,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy gradient plus KL to the reference, averaged over each rollout's tokens, then over rollouts.

    logprobs, old_logprobs, reference_logprobs: float32 [B, G, S] under the policy, the sampler and the reference;
    advantages: float32 [B, G]; generated: bool [B, G, S], the tokens that count. Returns the scalar loss and scalar
    metrics. The KL estimator is k3: exp(d) - d - 1 with d = reference - policy.
    """
    advantage = advantages[..., None]
    ratio = jnp.exp(jnp.where(generated, logprobs - old_logprobs, 0.0))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    difference = jnp.where(generated, reference_logprobs - logprobs, 0.0)
    kl = jnp.exp(difference) - difference - 1
    count = jnp.maximum(generated.sum(-1), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.mean((values * generated).sum(-1) / count)

    metrics = {"kl": mean(kl), "clip_fraction": mean((surrogate < ratio * advantage).astype(jnp.float32))}
    return mean(kl_coefficient * kl - surrogate), metrics
