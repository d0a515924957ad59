"""Softmax attention: over one set of keys, and over a shared prefix and an own suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from revseg_jax.errors import InputError
from revseg_jax.parallel.sharding import Placement, constrain
from revseg_jax.policy.attention_kernels import (
    cudnn_attention,
    cudnn_suffix_attention,
    splash_attention,
    splash_suffix_attention,
)
from revseg_jax.policy.attention_plain import (
    KEPT,
    head_major_attention,
    plain_attention,
    plain_gradients,
    shared_prefix_attention,
)

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
SHORT = 256  # slots; below it no kernel is chosen


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

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return self.placement.mesh.devices.flat[0].platform if self.placement is not None else jax.default_backend()

    def resolve(self, dtype: jnp.dtype, length: int, width: int) -> str:
        """ "xla" unless a kernel is known to take it. Windows of a few slots are batched matmuls, best left to XLA."""
        if self.implementation != "auto":
            return self.implementation
        if length < SHORT:
            return "xla"
        if self.platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128:
            return "cudnn"
        if self.platform == "tpu" and (self.placement is not None or jax.device_count() == 1):
            return "splash"
        return "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    causal: bool = False,
    choice: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
) -> tuple[jax.Array, jax.Array]:
    """Self-attention of each row, inside its segments where there are several.

    Shapes (N rows, S slots, H heads, K key heads that divide H, D head width):
      query [N, S, H, D]; key, value [N, S, K, D]
      segments int32 [N, S]: a query sees the keys of its own segment, and of these only those up to its own slot when
      `causal`. Padding is a segment of its own, wherever it stands: 0 by convention. None: a row is one segment. That
      saves masks, and does for causal rows with padding at their end too: no real query sees it.
    Returns the output [N, S, H, D] in the query's dtype and the log-sum-exp of the scores [N, S, H], float32 or wider.
    Gradients reach the output from every implementation, the log-sum-exp only from "xla".
    """
    run = {"xla": plain_attention, "cudnn": cudnn_attention, "splash": splash_attention}[
        choice.resolve(query.dtype, query.shape[1], query.shape[3])
    ]
    if run is not plain_attention:
        key, value = spread_alike(choice.placement, query.shape[2], key, value)
    if run is splash_attention and choice.placement is not None:
        run = on_mesh(run, choice.placement, rows=len(query), key_heads=key.shape[2])
    return run(query, key, value, segments, causal)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def windowed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    full: jax.Array,
    windows: int,
    choice: AttentionChoice,
) -> jax.Array:
    """Attention inside the segments of each window or, where `full`, of the whole row.

    query, key, value [N, W * S, H, D] of W windows; segments int32 [N, W * S], or None as in `attention`; full bool [],
    traced: one scan runs over blocks of both kinds. Returns [N, W * S, H, D]. Both kinds fold the same arrays, and the
    backward pass keeps these, once: JAX would keep what each branch of a condition folds. A kernel's forward pass runs
    again there.
    """
    return _windowed_forward(query, key, value, segments, full, windows, choice)[0]


def _windowed_forward(query, key, value, segments, full, windows, choice):
    def run(sets: int) -> tuple[jax.Array, jax.Array]:
        folded = _fold(sets, (query, key, value, segments))
        output, logsumexp = attention(*folded, choice=choice)
        if choice.resolve(query.dtype, folded[0].shape[1], query.shape[3]) != "xla":
            logsumexp = jnp.zeros_like(logsumexp)  # not needed, and a second call of the kernel
        return output.reshape(query.shape), logsumexp.reshape(query.shape[:3])

    result = jax.lax.cond(full, partial(run, 1), partial(run, windows))
    output, logsumexp = checkpoint_name(result, KEPT)
    return output, (query, key, value, segments, full, output, logsumexp)


def _windowed_backward(windows, choice, kept, into_output):
    *inputs, full, output, logsumexp = kept
    shape = into_output.shape

    def run(sets: int) -> tuple[jax.Array, ...]:
        *folded, result, result_logsumexp, into = _fold(sets, (*inputs, output, logsumexp, into_output))
        if choice.resolve(into.dtype, into.shape[1], shape[3]) == "xla":
            into_result = into, jnp.zeros_like(result_logsumexp)
            gradients = plain_gradients(False, (*folded, result, result_logsumexp), into_result)[:3]
        else:
            *own, own_segments = folded
            gradients = jax.vjp(lambda *own: attention(*own, own_segments, choice=choice)[0], *own)[1](into)
        return tuple(gradient.reshape(shape) for gradient in gradients)

    return *jax.lax.cond(full, partial(run, 1), partial(run, windows)), None, None


windowed_attention.defvjp(_windowed_forward, _windowed_backward)


def _fold(sets: int, parts: tuple[jax.Array | None, ...]) -> tuple[jax.Array | None, ...]:
    """[N, W * S, ...] -> [N * sets, W * S / sets, ...]."""
    return jax.tree.map(lambda part: part.reshape(len(part) * sets, -1, *part.shape[2:]), parts)


def suffix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    choice: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
) -> jax.Array:
    """`shared_prefix_attention` of whole suffixes, by a kernel where there is one that never holds the scores.

    real bool [B, G, S]: a query sees the real slots up to its own. Results at padding mean nothing.
    """
    implementation = choice.resolve(query.dtype, query.shape[2], query.shape[4])
    if implementation == "xla":
        causal = jnp.tril(jnp.ones((query.shape[2], query.shape[2]), bool))
        return shared_prefix_attention(query, key, value, causal & real[:, :, None, :], prefix)
    key, value, *shared = spread_alike(choice.placement, query.shape[3], key, value, *prefix[:2])
    prefix = *shared, prefix[2]
    if implementation == "cudnn":
        return cudnn_suffix_attention(query, key, value, real, prefix)
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


def cached_attention(
    query: jax.Array,
    own: tuple[jax.Array, jax.Array, jax.Array],
    shared: tuple[jax.Array, jax.Array, jax.Array],
    slot: jax.Array,
    choice: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
) -> jax.Array:
    """Attention of tokens at slots [slot, slot + S) of every suffix; their keys and values are in the cache already.

    query [B, G, S, H, D]; own: key, value [B, K, G, T, D] and bool [B, G, T], which slots are real; shared: key, value
    [B, K, P, D] and bool [B, P]. Returns [B, G, S, H, D]. Several tokens at once go by a kernel where there is one.
    """
    key, value, filled = own
    slots, length, width = filled.shape[2], query.shape[2], query.shape[4]
    if length == 1 or choice.resolve(query.dtype, slots, width) == "xla":
        causal = jnp.arange(slots) <= slot + jnp.arange(length)[:, None]
        return head_major_attention(query, (key, value, filled[:, :, None, :] & causal), shared)
    # Kernels take whole suffixes: in the other slots stand queries of zeros.
    whole = jnp.zeros((*query.shape[:2], slots, *query.shape[3:]), query.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, query, slot, axis=2)
    prefix = jnp.moveaxis(shared[0], 1, 2), jnp.moveaxis(shared[1], 1, 2), shared[2]
    mixed = suffix_attention(whole, jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 3), filled, prefix, choice)
    return jax.lax.dynamic_slice_in_dim(mixed, slot, length, axis=2)


def spread_alike(placement: Placement | None, heads: int, *keys_and_values: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values [rows, ..., K, D]; where the mesh divides the queries' heads but not K, each once a query's head,
    [rows, ..., H, D]: kernels take the same parts of the heads of all three, or all heads."""
    if placement is None or keys_and_values[0].shape[-2] % placement.parts("key_heads") == 0:
        return keys_and_values
    if heads % placement.parts("heads"):
        return keys_and_values

    def spread(part: jax.Array) -> jax.Array:
        repeated = jnp.repeat(part, heads // part.shape[-2], axis=-2)
        return constrain(placement, repeated, "prompts", *[None] * (part.ndim - 3), "heads")

    return tuple(map(spread, keys_and_values))


def on_mesh(run: Callable, placement: Placement, rows: int, key_heads: int) -> Callable:
    """`run` on every device's own rows and heads: a Pallas kernel that the compiler could not partition by itself."""
    batch, tensor = placement.spec((rows, key_heads), "prompts", "key_heads")
    heads = PartitionSpec(batch, None, tensor, None)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool):
        return jax.shard_map(
            lambda *parts: run(*parts, causal),
            mesh=placement.mesh,
            in_specs=(heads, heads, heads, PartitionSpec(batch, None)),
            out_specs=(heads, PartitionSpec(batch, None, tensor)),
            check_vma=False,  # Pallas calls do not say how their results vary over the mesh
        )(query, key, value, segments)

    return local
