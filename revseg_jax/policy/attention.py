"""Softmax attention: over one set of keys, and over a shared prefix and an own suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from revseg_jax.errors import InputError
from revseg_jax.parallel.sharding import Placement
from revseg_jax.policy.attention_kernels import cudnn_attention, splash_attention, splash_suffix_attention

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
SHORT = 256  # slots; below it no kernel is chosen
BLOCK = 512  # queries whose scores exist at a time in plain XLA
MASKED = -1e30  # finite, so that rows without any visible key stay finite (they are padding and never read)


@dataclass(frozen=True)
class AttentionChoice:
    """Attributes:
    implementation: "auto" chooses by platform, type and length; or "xla", "cudnn", "splash"
    placement: how rows and heads are spread over the devices; splash needs it on several of them
    """

    implementation: str = "auto"
    placement: Placement | None = None

    def __post_init__(self) -> None:
        if self.implementation not in ("auto", *IMPLEMENTATIONS):
            raise InputError(f"attention={self.implementation} is not one of auto, {', '.join(IMPLEMENTATIONS)}")

    def resolve(self, dtype: jnp.dtype, length: int, width: int) -> str:
        """ "xla" unless a kernel is known to take it. Windows of a few slots are batched matmuls, best left to XLA."""
        if self.implementation != "auto":
            return self.implementation
        placement = self.placement
        platform = placement.mesh.devices.flat[0].platform if placement is not None else jax.default_backend()
        if length < SHORT:
            return "xla"
        if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128:
            return "cudnn" if length % 2 == 0 else "xla"  # no gradient for odd lengths
        if platform == "tpu" and (placement is not None or jax.device_count() == 1):
            return "splash"
        return "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    causal: bool = False,
    choice: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
) -> tuple[jax.Array, jax.Array]:
    """Self-attention inside the segments of each row.

    Shapes (N rows, S slots, H heads, K key heads that divide H, D head width):
      query [N, S, H, D]; key, value [N, S, K, D]
      segments int32 [N, S]: a query sees the keys of its own segment, and of these only those up to its own slot when
      `causal`. Padding is a segment of its own, wherever it stands: 0 by convention.
    Returns the output [N, S, H, D] in the query's dtype and the log-sum-exp of the scores [N, S, H], float32 or wider.
    Gradients reach the output from every implementation, the log-sum-exp only from "xla".
    """
    run = {"xla": plain_attention, "cudnn": cudnn_attention, "splash": splash_attention}[
        choice.resolve(query.dtype, query.shape[1], query.shape[3])
    ]
    if run is splash_attention and choice.placement is not None:
        run = on_mesh(run, choice.placement, rows=len(query), key_heads=key.shape[2])
    return run(query, key, value, segments, causal)


def suffix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    choice: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
) -> jax.Array:
    """`shared_prefix_attention` of whole suffixes, by a kernel where there is one that never holds the scores.

    mask bool [B, G, S, S] is causal: a query sees the real slots up to its own. Results at padding mean nothing.
    """
    if choice.resolve(query.dtype, query.shape[2], query.shape[4]) != "splash":
        return shared_prefix_attention(query, key, value, mask, prefix)
    real = jnp.diagonal(mask, axis1=-2, axis2=-1)
    if choice.placement is None:
        return splash_suffix_attention(query, key, value, real, prefix)
    table = choice.placement
    rows = table.spec((len(query),), "prompts")[0]
    heads = table.spec((key.shape[3],), "key_heads")[0]
    suffix, shared = PartitionSpec(rows, None, None, heads), PartitionSpec(rows, None, heads)
    return jax.shard_map(
        splash_suffix_attention,
        mesh=table.mesh,
        in_specs=(suffix, suffix, suffix, PartitionSpec(rows), (shared, shared, PartitionSpec(rows))),
        out_specs=suffix,
        check_vma=False,  # Pallas calls do not say how their results vary over the mesh
    )(query, key, value, real, prefix)


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """`attention` in plain XLA: the reference. Long rows are read in blocks of queries: few scores exist at a time, and
    keys that no query of a causal block sees are left out."""
    length = query.shape[1]
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = stop if causal else length
        own, keys = segments[:, start:stop], segments[:, :seen]
        blocks.append(_block_attention(query[:, start:stop], key[:, :seen], value[:, :seen], own, keys, causal))
    output, logsumexp = zip(*blocks, strict=True)
    return jnp.concatenate(output, 1), jnp.concatenate(logsumexp, 1)


def _block_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, key_segments: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """`attention` of S queries over T keys; `causal`: the queries stand in the last S slots of the keys."""
    visible = segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= jnp.tril(jnp.ones(visible.shape[1:], bool), key.shape[1] - query.shape[1])
    keys = (jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1), visible[:, None, None, None])
    output, logsumexp = softmax_attention(_group_heads(query[:, None], key.shape[2]), (keys,))
    logsumexp = jnp.moveaxis(logsumexp.reshape(len(query), -1, query.shape[1]), 1, 2)
    return _join_heads(output)[:, 0], logsumexp


def on_mesh(run: Callable, placement: Placement, rows: int, key_heads: int) -> Callable:
    """`run` on every device's own rows and heads: a Pallas kernel that the compiler could not partition by itself."""
    batch, tensor = placement.spec((rows, key_heads), "prompts", "key_heads")
    heads = PartitionSpec(batch, None, tensor, None)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, causal: bool):
        return jax.shard_map(
            lambda *parts: run(*parts, causal),
            mesh=placement.mesh,
            in_specs=(heads, heads, heads, PartitionSpec(batch, None)),
            out_specs=(heads, PartitionSpec(batch, None, tensor)),
            check_vma=False,  # Pallas calls do not say how their results vary over the mesh
        )(query, key, value, segments)

    return local


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
    prefix_key, prefix_value, prefix_mask = prefix
    own = (_head_major(key), _head_major(value), mask[:, None, :, None])
    shared = (jnp.moveaxis(prefix_key, 2, 1), jnp.moveaxis(prefix_value, 2, 1), prefix_mask[:, None, None, None, None])
    return _join_heads(softmax_attention(_group_heads(query, key.shape[3]), (own, shared))[0])


def _head_major(part: jax.Array) -> jax.Array:
    """[B, G, T, K, D] -> [B, K, G, T, D]."""
    return jnp.moveaxis(part, 3, 1)


def _group_heads(query: jax.Array, key_heads: int) -> jax.Array:
    """[B, G, S, H, D] -> [B, K, G, R, S, D]: R query heads for each of K key heads."""
    *lead, heads, width = query.shape
    return jnp.moveaxis(query.reshape(*lead, key_heads, heads // key_heads, width), (3, 4), (1, 3))


def _join_heads(mixed: jax.Array) -> jax.Array:
    """Undoes `_group_heads`."""
    return jnp.moveaxis(mixed, (1, 3), (3, 4)).reshape(
        *mixed.shape[:1], mixed.shape[2], mixed.shape[4], -1, mixed.shape[5]
    )


KeySet = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def softmax_attention(query: jax.Array, key_sets: tuple[KeySet, ...]) -> tuple[jax.Array, jax.Array]:
    """One softmax over several sets of keys, in float32 or wider, with heads before slots: every product is a batched
    matmul of its operands as they lie.

    Shapes (B prompts, K key heads, G rollouts, R query heads a key head, S queries, T keys, D head width):
      query [B, K, G, R, S, D]
      key_sets: key and value [B, K, G, T, D], a rollout's own, or [B, K, T, D], shared by all; mask bool that
      broadcasts to [B, K, G, R, S, T] (True: visible)
    Returns the output [B, K, G, R, S, D] in the query's dtype and the log-sum-exp [B, K, G, R, S], float32 or wider.
    Weights stay unnormalised until they have mixed the values. The backward pass computes the scores again from the
    log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2, in one block) instead of keeping them.
    """
    return _softmax_forward(query, key_sets)[0]


def _softmax_forward(query: jax.Array, key_sets: tuple[KeySet, ...]):
    scores = [_scores(query, key, mask) for key, _, mask in key_sets]
    top = jnp.stack([part.max(-1) for part in scores]).max(0)[..., None]
    weights = [jnp.exp(part - top) for part in scores]
    total = sum(part.sum(-1, keepdims=True) for part in weights)
    mixed = sum(
        jnp.einsum(
            f"bkgrst,{_axes(value)}->bkgrsd", part.astype(value.dtype), value, preferred_element_type=total.dtype
        )
        for part, (_, value, _) in zip(weights, key_sets, strict=True)
    )
    output, logsumexp = (mixed / total).astype(query.dtype), (top + jnp.log(total))[..., 0]
    return (output, logsumexp), (query, key_sets, output, logsumexp)


def _softmax_backward(kept, gradients):
    query, key_sets, output, logsumexp = kept
    into_output, into_logsumexp = gradients
    wide = logsumexp.dtype
    offset = into_logsumexp - jnp.sum(into_output.astype(wide) * output.astype(wide), -1)
    into_query, into_sets = 0.0, []
    for key, value, mask in key_sets:
        axes = _axes(key)
        weights = jnp.exp(_scores(query, key, mask) - logsumexp[..., None])
        into_weights = jnp.einsum(f"bkgrsd,{axes}->bkgrst", into_output, value, preferred_element_type=wide)
        into_scores = (weights * (into_weights + offset[..., None])).astype(query.dtype)
        into_query += jnp.einsum(f"bkgrst,{axes}->bkgrsd", into_scores, key, preferred_element_type=wide)
        # The narrow factor first: a product's first factor and its result are transposed here, the second one is not.
        sum_queries = partial(jnp.einsum, f"bkgrsd,bkgrst->{axes[:-2]}dt", preferred_element_type=wide)
        into_key = sum_queries(query, into_scores).mT * _scale(query)
        into_value = sum_queries(into_output, weights.astype(query.dtype)).mT
        into_sets.append((into_key.astype(key.dtype), into_value.astype(value.dtype), None))
    return (into_query * _scale(query)).astype(query.dtype), tuple(into_sets)


softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, G, R, S, T], float32 or wider."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(f"bkgrsd,{_axes(key)}->bkgrst", query * _scale(query), key, preferred_element_type=wide)
    return jnp.where(mask, scores, MASKED)


def _scale(query: jax.Array) -> float:
    return query.shape[-1] ** -0.5


def _axes(key: jax.Array) -> str:
    return "bkgtd" if key.ndim == 5 else "bktd"
