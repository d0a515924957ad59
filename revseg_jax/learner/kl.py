"""How far the policy is from the frozen reference, estimated from the sampled tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl_estimate(kind: str, logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """Estimates of KL(policy | reference), one for each token sampled from the policy; any shape.

    With r = reference / policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (Schulman, "Approximating KL
    divergence", 2020). The mean of k1 and k3 is the KL. In the loss it is the gradient that counts: on average k2's is
    that of the KL, k3's that of KL(reference | policy), and k1's is 0, so k1 belongs in the reward.
    """
    log_ratio = reference_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    return log_ratio**2 / 2 if kind == "k2" else jnp.exp(log_ratio) - log_ratio - 1
