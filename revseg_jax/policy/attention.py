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


# Scores and weights are computed again in the backward pass: keeping them takes memory, and more time than it saves.
# Without prevent_cse, so that inside a layer that is recomputed as a whole they are not computed a third time.
@partial(jax.checkpoint, static_argnums=5, prevent_cse=False)
def _block_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, key_segments: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """`attention` of S queries over T keys; `causal`: the queries stand in the last S slots of the keys."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    rows, length, heads, width = query.shape
    key_heads = key.shape[2]
    grouped = query.reshape(rows, length, key_heads, heads // key_heads, width) * width**-0.5
    scores = jnp.einsum("nskrd,ntkd->nkrst", grouped, key, preferred_element_type=wide)
    visible = segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= jnp.tril(jnp.ones(visible.shape[1:], bool), key.shape[1] - length)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    mixed = jnp.einsum("nkrst,ntkd->nskrd", weights, value)
    logsumexp = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), 3, 1)
    return mixed.reshape(query.shape), logsumexp.reshape(query.shape[:3])


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
    wide = jnp.promote_types(query.dtype, jnp.float32)
    prompts, groups, length, heads, width = query.shape
    key_heads = key.shape[3]
    grouped = query.reshape(prompts, groups, length, key_heads, heads // key_heads, width) * width**-0.5
    scores = jnp.einsum("bgskrd,bgtkd->bgkrst", grouped, key, preferred_element_type=wide)
    scores = jnp.where(mask[:, :, None, None], scores, MASKED)
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
