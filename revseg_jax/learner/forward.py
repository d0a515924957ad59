"""What the policy says about a rollout batch: hidden states of the suffixes and log-probabilities of their tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.policy.model import Policy, PrefixTokens, chunked_logprobs
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.keyframes import encode_keyframes


def suffix_hidden(policy: Policy, batch: RolloutBatch) -> jax.Array:
    """Final-normed hidden [B, G, S, width] of every suffix slot; video and prompt are read once a group."""
    positions = jnp.moveaxis(batch.prefix_positions, 1, 0)
    prefix = PrefixTokens(batch.prefix_tokens, positions, batch.prefix_mask, policy.encode(batch.frames))
    images = encode_keyframes(policy, batch.keyframes, batch.keyframe_index)
    return policy.suffix_hidden(prefix, batch.tokens, jnp.moveaxis(batch.positions, 2, 0), batch.mask, images)


def token_logprobs(
    policy: Policy, hidden: jax.Array, tokens: jax.Array, slots: np.ndarray, chunk: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, G, S] of the suffix tokens in `slots`, static, each given all before
    it; 0 in the other slots, which are not put to the vocabulary at all."""
    both = chunked_logprobs(policy, hidden[:, :, slots - 1], tokens[:, :, slots], chunk, temperature)
    # Which of the results each slot takes; a gather along slots stays on the device.
    order = np.full(tokens.shape[-1], len(slots))
    order[slots] = np.arange(len(slots))
    last = ((0, 0), (0, 0), (0, 1))
    logprobs, entropy = (jnp.pad(values, last)[:, :, order] for values in both)
    return logprobs, entropy
