"""Attention kernels of the accelerators: cuDNN's flash attention (NVIDIA) and Pallas splash attention (TPU).

Their variants that return the log-sum-exp have no (right) gradient, so output and log-sum-exp come from two calls;
under jit the one that nobody reads is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.policy.attention_plain import KEPT

LANES = 128  # splash works in blocks of this many slots
LONG = 512  # slots above which rows are padded to larger blocks


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, for float16 and bfloat16. The log-sum-exp comes in that type's precision, without a gradient."""
    length = query.shape[1]
    # JAX takes the gradient of even lengths only.
    *parts, segments = _padded(length + length % 2, query, key, value, segments, causal)
    # A mask costs cuDNN an array of [N, S, S], which none of its own masks needs.
    same = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    run = partial(jax.nn.dot_product_attention, mask=same, is_causal=causal, implementation="cudnn")
    _, logsumexp = run(*map(jax.lax.stop_gradient, parts), return_residual=True)
    return run(*parts)[:, :length], logsumexp.astype(jnp.float32)[:, :length]


def cudnn_suffix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    run: Callable = cudnn_attention,
) -> jax.Array:
    """As `splash_suffix_attention`. run: an `attention` of another platform, to test with.

    Every suffix becomes a row of its own with the prefix before it and its real slots first: causal attention needs no
    mask then, which would be an array of [G, S, P + S] for cuDNN. The prefix's keys and values are copied G times,
    little beside the scores that are never held, and stand beside queries of zeros, as cuDNN's causal mask wants as
    many queries as keys.
    """
    shared = prefix[0].shape[1]

    def rows(prefix_part: jax.Array, part: jax.Array) -> jax.Array:
        """[B, P, ...] and [B, G, S, ...] -> [B * G, P + S, ...]"""
        copies = jnp.broadcast_to(prefix_part[:, None], (*part.shape[:2], *prefix_part.shape[1:]))
        both = jnp.concatenate([copies.astype(part.dtype), part], axis=2)
        return both.reshape(-1, *both.shape[2:])

    order = jnp.argsort(~rows(prefix[2], real), axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    nothing = jnp.zeros((len(query), shared, *query.shape[3:]), query.dtype)
    parts = rows(nothing, query), rows(prefix[0], key), rows(prefix[1], value)
    output, _ = run(*(_permuted(part, order, back) for part in parts), None, True)
    return _permuted(output, back, order)[:, shared:].reshape(query.shape)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """The slots of x [N, S, H, D] in another order, int [N, S]; `back` is its inverse, by which the gradient is taken
    from where it stands. JAX would add it up, by atomic operations on a GPU."""
    return jnp.take_along_axis(x, order[..., None, None], axis=1, mode="promise_in_bounds")


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda kept, into: (_permuted(into, *reversed(kept)), None, None),
)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, on one device. No gradient through the log-sum-exp. interpret: without a TPU, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, and only TPUs need it

    length, heads, width = query.shape[1:]
    padded = padded_length(length)
    *parts, segments = _padded(padded, query * width**-0.5, key, value, segments, causal)
    if segments is not None:
        segments = splash.SegmentIds(segments, segments)
    blocks = _blocks(padded)
    mask = (splash.CausalMask if causal else splash.FullMask)((padded, padded))

    def run(with_logsumexp: bool):
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=with_logsumexp,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )

        return jax.vmap(kernel)

    parts = [part.swapaxes(1, 2) for part in parts]  # [N, H, S, D]
    output = run(False)(*parts, segments).swapaxes(1, 2)
    _, (logsumexp,) = run(True)(*map(jax.lax.stop_gradient, parts), segments)
    return output[:, :length], logsumexp.swapaxes(1, 2)[:, :length]


def splash_suffix_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    interpret: bool = False,
) -> jax.Array:
    """Attention of G whole suffixes over their shared prefix and causally over themselves, on one device.

    query [B, G, S, H, D]; key, value [B, G, S, K, D]; real bool [B, G, S]; prefix: key, value [B, P, K, D] and mask
    bool [B, P]. Returns [B, G, S, H, D]. The keys of a prompt stand in one row, prefix and then suffix after suffix,
    under a static mask whose empty blocks (another rollout's slots, later slots of the own) are skipped, forward and
    backward.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    prompts, groups, length, heads, width = query.shape
    prefix_key, prefix_value, prefix_real = prefix
    own, shared = padded_length(length), padded_length(prefix_key.shape[1])

    def suffixes(part: jax.Array) -> jax.Array:
        padded = jnp.pad(part, ((0, 0), (0, 0), (0, own - length), *[(0, 0)] * (part.ndim - 3)))
        return padded.reshape(prompts, groups * own, *part.shape[3:])

    def row(prefix_part: jax.Array, part: jax.Array) -> jax.Array:
        missing = shared - prefix_part.shape[1]
        padded = jnp.pad(prefix_part, ((0, 0), (0, missing), *[(0, 0)] * (prefix_part.ndim - 2)))
        return jnp.concatenate([padded.astype(part.dtype), suffixes(part)], axis=1)

    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_suffix_mask(shared, own, groups)] * heads),
        # Fused, the backward kernel would write a whole gradient of the queries for every block of keys.
        block_sizes=_blocks(math.gcd(own, shared), fused=False),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    # Padding is segment 0. Its queries see at least themselves, so that no row of weights is empty.
    segments = real.astype(jnp.int32)
    ids = splash.SegmentIds(suffixes(segments), row(prefix_real.astype(jnp.int32), segments))
    parts = suffixes(query * width**-0.5), row(prefix_key, key), row(prefix_value, value)
    output = jax.vmap(kernel)(*(part.swapaxes(1, 2) for part in parts), ids).swapaxes(1, 2)
    return output.reshape(prompts, groups, own, heads, width)[:, :, :length]


def _padded(
    slots: int, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, causal: bool
) -> tuple[jax.Array | None, ...]:
    """Arguments of `attention` with so many slots; no query sees the new ones."""
    more = (0, slots - query.shape[1])
    if segments is None and not causal and any(more):
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), more), constant_values=-1)
    return *(jnp.pad(part, ((0, 0), more, (0, 0), (0, 0))) for part in (query, key, value)), segments


def padded_length(length: int) -> int:
    """Slots that splash computes for so many: whole blocks, larger ones for longer rows."""
    block = LANES if length <= LONG else 2 * LANES
    return -(-length // block) * block


def block_size(length: int) -> int:
    """Slots of splash's blocks for rows whose padded lengths are multiples of `length`."""
    return next(size for size in (512, 256, LANES) if length % size == 0)


def _blocks(length: int, fused: bool = True):
    """Splash's block sizes for rows whose lengths are multiples of `length`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = block_size(length)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    names += () if fused else ("block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=fused)


def _suffix_mask(shared: int, own: int, groups: int):
    """Splash's mask [groups * own, shared + groups * own], written out block by block only."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    class SuffixMask(splash_attention_mask.Mask):
        @property
        def shape(self) -> tuple[int, int]:
            return groups * own, shared + groups * own

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            query, key = (np.arange(size)[cut] for size, cut in zip(self.shape, index, strict=True))
            slot = key - shared
            visible = (slot // own == query[:, None] // own) & (slot <= query[:, None])
            return visible | (slot < 0)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, type(self)) and self.shape == other.shape

        def __hash__(self) -> int:
            return hash((shared, own, groups))

    return SuffixMask()
