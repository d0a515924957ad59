"""What the policy says about a rollout batch: hidden states of the suffixes and log-probabilities of their tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from revseg_jax.policy.model import Policy, chunked_logprobs
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.keyframes import encode_keyframes


def suffix_hidden(policy: Policy, batch: RolloutBatch) -> jax.Array:
    """Final-normed hidden [B, G, S, width] of every suffix slot; video and prompt are read once a group."""
    video = policy.encode(batch.frames)
    prefix = policy.prefill(batch.prefix_tokens, jnp.moveaxis(batch.prefix_positions, 1, 0), batch.prefix_mask, video)
    images = encode_keyframes(policy, batch.keyframes, batch.keyframe_index)
    return policy.suffix_hidden(prefix, batch.tokens, jnp.moveaxis(batch.positions, 2, 0), batch.mask, images)


def token_logprobs(policy: Policy, hidden: jax.Array, tokens: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, G, S] of every suffix token given all before it; slot 0 gets 0."""
    logprobs, entropy = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], chunk)
    first = ((0, 0), (0, 0), (1, 0))
    return jnp.pad(logprobs, first), jnp.pad(entropy, first)
