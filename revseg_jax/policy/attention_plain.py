"""Softmax attention in plain XLA: the reference of every kernel, and what runs where there is none.

What the backward pass needs of a forward pass is its output and log-sum-exp, called `KEPT` for remat policies: the
scores are computed again from them (FlashAttention-2, arXiv 2307.08691, algorithm 2).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 512  # queries whose scores exist at a time
MASKED = -1e30  # finite, so that rows without any visible key stay finite (they are padding and never read)
KEPT = "attention"

KeySet = tuple[jax.Array, jax.Array, jax.Array | None]  # key, value and mask, as `softmax_attention` takes them


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """`attention` in plain XLA: the reference. Long rows are read in blocks of queries: few scores exist at a time, and
    keys that no query of a causal block sees are left out. The backward pass keeps what came in and what came out,
    and goes through the same blocks."""
    return _plain_forward(query, key, value, segments, causal)[0]


def _plain_forward(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool):
    grouped = _group_heads(query[:, None], key.shape[2])
    blocks = _blocks(key, value, segments, causal)
    mixed = [_softmax(grouped[..., block, :], (keys_seen,)) for block, keys_seen in blocks]
    output, logsumexp = zip(*mixed, strict=True)
    output = _join_heads(jnp.concatenate(output, -2))[:, 0]
    logsumexp = jnp.moveaxis(jnp.concatenate(logsumexp, -1).reshape(len(query), -1, query.shape[1]), 1, 2)
    output, logsumexp = checkpoint_name((output, logsumexp), KEPT)
    return (output, logsumexp), (query, key, value, segments, output, logsumexp)


def plain_gradients(causal: bool, kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]):
    """kept: query, key, value and segments as `plain_attention` took them, output and log-sum-exp as it gave them.
    gradients: of these two. Returns those of query, key and value, and None."""
    query, key, value, segments, output, logsumexp = kept
    group = partial(_group_heads, key_heads=key.shape[2])
    query, output, into_output = (group(part[:, None]) for part in (query, output, gradients[0]))
    logsumexp, into_logsumexp = (group(part[:, None, :, :, None])[..., 0] for part in (logsumexp, gradients[1]))
    into_query, into_keys, into_values = [], *(jnp.zeros_like(jnp.moveaxis(part, 2, 1)) for part in (key, value))
    for block, keys_seen in _blocks(key, value, segments, causal):
        seen = keys_seen[0].shape[2]
        result = output[..., block, :], logsumexp[..., block]
        into_result = into_output[..., block, :], into_logsumexp[..., block]
        into_block, (into_seen,) = _softmax_backward((query[..., block, :], (keys_seen,), *result), into_result)
        into_query.append(into_block)
        into_keys = into_keys.at[:, :, :seen].add(into_seen[0])
        into_values = into_values.at[:, :, :seen].add(into_seen[1])
    into_query = _join_heads(jnp.concatenate(into_query, -2))[:, 0]
    return into_query, jnp.moveaxis(into_keys, 1, 2), jnp.moveaxis(into_values, 1, 2), None


plain_attention.defvjp(_plain_forward, plain_gradients)


def _blocks(key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool) -> list[tuple[slice, KeySet]]:
    """The queries of each block, and of the keys, from the first, those that any of them may see: a set of
    `softmax_attention`."""
    keys, values, length = jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1), key.shape[1]
    blocks = []
    for start in range(0, length, BLOCK):
        block = slice(start, min(start + BLOCK, length))
        seen, mask = block.stop if causal else length, None
        if segments is not None:
            mask = (segments[:, block, None] == segments[:, None, :seen])[:, None, None, None]
        if causal:
            earlier = jnp.tril(jnp.ones((block.stop - start, seen), bool), start)
            mask = earlier if mask is None else earlier & mask
        blocks.append((block, (keys[:, :, :seen], values[:, :, :seen], mask)))
    return blocks


def shared_prefix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """Softmax attention of G suffixes over one prefix and over themselves, with nothing copied G times.

    Shapes (B prompts, G rollouts, S queries, T own keys, P prefix keys, H heads, K key heads, D head width):
      query [B, G, S, H, D]; key, value [B, G, T, K, D]; mask bool [B, G, S, T] (True: visible)
      prefix: key, value [B, P, K, D] and mask bool [B, P]; every suffix query sees every real prefix token.
    Returns [B, G, S, H, D] in the query's dtype. One softmax runs over both key sets, in float32 or wider, so gradients
    reach the prefix from every rollout and equal those of G separate sequences.
    """
    own = (jnp.moveaxis(key, 3, 1), jnp.moveaxis(value, 3, 1), mask)
    prefix_key, prefix_value, prefix_mask = prefix
    shared = (jnp.moveaxis(prefix_key, 2, 1), jnp.moveaxis(prefix_value, 2, 1), prefix_mask)
    return head_major_attention(query, own, shared)


def head_major_attention(
    query: jax.Array,
    own: tuple[jax.Array, jax.Array, jax.Array],
    shared: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """`shared_prefix_attention` of keys and values [B, K, G, T, D] of its own and [B, K, P, D] of the prefix."""
    own_key, own_value, mask = own
    key, value, prefix_mask = shared
    sets = (own_key, own_value, mask[:, None, :, None]), (key, value, prefix_mask[:, None, None, None, None])
    return _join_heads(softmax_attention(_group_heads(query, key.shape[1]), sets)[0])


def _group_heads(query: jax.Array, key_heads: int) -> jax.Array:
    """[B, G, S, H, D] -> [B, K, G, R, S, D]: R query heads for each of K key heads."""
    *lead, heads, width = query.shape
    return jnp.moveaxis(query.reshape(*lead, key_heads, heads // key_heads, width), (3, 4), (1, 3))


def _join_heads(mixed: jax.Array) -> jax.Array:
    """Undoes `_group_heads`."""
    return jnp.moveaxis(mixed, (1, 3), (3, 4)).reshape(
        *mixed.shape[:1], mixed.shape[2], mixed.shape[4], -1, mixed.shape[5]
    )


@jax.custom_vjp
def softmax_attention(query: jax.Array, key_sets: tuple[KeySet, ...]) -> tuple[jax.Array, jax.Array]:
    """One softmax over several sets of keys, in float32 or wider, with heads before slots: every product is a batched
    matmul of its operands as they lie.

    Shapes (B prompts, K key heads, G rollouts, R query heads a key head, S queries, T keys, D head width):
      query [B, K, G, R, S, D]
      key_sets: key and value [B, K, G, T, D], a rollout's own, or [B, K, T, D], shared by all; mask bool that
      broadcasts to [B, K, G, R, S, T] (True: visible)
    Returns the output [B, K, G, R, S, D] in the query's dtype and the log-sum-exp [B, K, G, R, S], float32 or wider.
    Weights stay unnormalised until they have mixed the values.
    """
    return _softmax_forward(query, key_sets)[0]


def _softmax_forward(query: jax.Array, key_sets: tuple[KeySet, ...]):
    output, logsumexp = checkpoint_name(_softmax(query, key_sets), KEPT)
    return (output, logsumexp), (query, key_sets, output, logsumexp)


def _softmax(query: jax.Array, key_sets: tuple[KeySet, ...]) -> tuple[jax.Array, jax.Array]:
    scores = [_scores(query, key, mask) for key, _, mask in key_sets]
    top = jnp.stack([part.max(-1) for part in scores]).max(0)[..., None]
    weights = [jnp.exp(part - top) for part in scores]
    total = sum(part.sum(-1, keepdims=True) for part in weights)
    mixed = sum(
        _product(part.astype(value.dtype), value) for part, (_, value, _) in zip(weights, key_sets, strict=True)
    )
    return (mixed / total).astype(query.dtype), (top + jnp.log(total))[..., 0]


def _softmax_backward(kept, gradients):
    query, key_sets, output, logsumexp = kept
    into_output, into_logsumexp = gradients
    wide = logsumexp.dtype
    offset = into_logsumexp - jnp.sum(into_output.astype(wide) * output.astype(wide), -1)
    into_query, into_sets = 0.0, []
    for key, value, mask in key_sets:
        weights = jnp.exp(_scores(query, key, mask) - logsumexp[..., None])
        into_weights = _product(into_output, value.mT)
        into_scores = (weights * (into_weights + offset[..., None])).astype(query.dtype)
        into_query += _product(into_scores, key)
        # Summed over the queries, so one factor has to be turned: the narrow one. The compiler would move the
        # transposition of the result into the product, and turn the wide one: half as fast on a CPU.
        rows = partial(_rows, axes=key.ndim)
        sum_queries = partial(jnp.einsum, "...rd,...rt->...dt", preferred_element_type=wide)
        into_key = jax.lax.optimization_barrier(sum_queries(rows(query), rows(into_scores))).mT * _scale(query)
        into_value = jax.lax.optimization_barrier(sum_queries(rows(into_output), rows(weights.astype(query.dtype)))).mT
        into_sets.append((into_key.astype(key.dtype), into_value.astype(value.dtype), None))
    return (into_query * _scale(query)).astype(query.dtype), tuple(into_sets)


softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B, K, G, R, S, T], float32 or wider."""
    scores = _product(query * _scale(query), key.mT)
    return scores if mask is None else scores + _hidden(mask)


def _hidden(mask: jax.Array) -> jax.Array:
    """What is added to scores, which leaves MASKED as it is: they are far smaller than its last digit. What is selected
    by a mask XLA on a CPU writes to memory; what is added it fuses with the scores' product and the softmax."""
    return jnp.where(mask, 0.0, MASKED)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B, K, G, R, S, M] times a set's [B, K, G, M, N] or [B, K, M, N] -> [B, K, G, R, S, N], float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.matmul(_rows(x, matrix.ndim), matrix, preferred_element_type=wide)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rows(x: jax.Array, axes: int) -> jax.Array:
    """[B, K, G, R, S, D] -> [B, K, G * R * S, D] beside keys of 4 axes, [B, K, G, R * S, D] beside those of 5: as they
    lie. Axes that products would keep apart, the compiler may lay out in another order, and copy them."""
    return x.reshape(*x.shape[: axes - 2], -1, x.shape[-1])


def _scale(query: jax.Array) -> float:
    return query.shape[-1] ** -0.5
