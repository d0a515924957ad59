"""Attention over a shared prefix and an own suffix, in plain XLA: the reference implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that rows without any visible key stay finite (they are padding and never read)


def shared_prefix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention of G suffixes over one prefix and over themselves, with nothing copied G times.

    Shapes (B prompts, G rollouts, S queries, T own keys, P prefix keys, H heads, K key heads, D head width):
      query [B, G, S, H, D]; key, value [B, G, T, K, D]; mask bool [B, G, S, T] (True: visible)
      prefix: key, value [B, P, K, D] and mask bool [B, P]; every suffix query sees every real prefix token.
    Returns [B, G, S, H, D] in the query's dtype. One softmax runs over both key sets, in float32 or wider, so gradients
    reach the prefix from every rollout and equal those of G separate sequences.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    prompts, groups, length, heads, width = query.shape
    key_heads = key.shape[3]
    grouped = query.reshape(prompts, groups, length, key_heads, heads // key_heads, width) * width**-0.5
    scores = jnp.einsum("bgskrd,bgtkd->bgkrst", grouped, key, preferred_element_type=wide)
    scores = jnp.where(mask[:, :, None, None], scores, MASKED)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        mixed = jnp.einsum("bgkrst,bgtkd->bgskrd", weights, value)
        return mixed.reshape(query.shape)
    prefix_key, prefix_value, prefix_mask = prefix
    prefix_scores = jnp.einsum("bgskrd,bpkd->bgkrsp", grouped, prefix_key, preferred_element_type=wide)
    prefix_scores = jnp.where(prefix_mask[:, None, None, None, None], prefix_scores, MASKED)
    top = jnp.maximum(scores.max(-1, keepdims=True), prefix_scores.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # cancels exactly; only keeps exp in range
    weights, prefix_weights = jnp.exp(scores - top), jnp.exp(prefix_scores - top)
    total = weights.sum(-1, keepdims=True) + prefix_weights.sum(-1, keepdims=True)
    weights, prefix_weights = (weights / total).astype(query.dtype), (prefix_weights / total).astype(query.dtype)
    mixed = jnp.einsum("bgkrst,bgtkd->bgskrd", weights, value)
    mixed += jnp.einsum("bgkrsp,bpkd->bgskrd", prefix_weights, prefix_value)
    return mixed.reshape(query.shape)
