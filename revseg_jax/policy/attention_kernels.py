"""Attention kernels of the accelerators: cuDNN's flash attention (NVIDIA) and Pallas splash attention (TPU).

Their variants that return the log-sum-exp have no (right) gradient, so output and log-sum-exp come from two calls;
under jit the one that nobody reads is dropped.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

LANES = 128  # splash works in blocks of this many slots


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, for float16 and bfloat16. The log-sum-exp comes in that type's precision, without a gradient."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    run = partial(jax.nn.dot_product_attention, mask=same, is_causal=causal, implementation="cudnn")
    _, logsumexp = run(*map(jax.lax.stop_gradient, (query, key, value)), return_residual=True)
    return run(query, key, value), logsumexp.astype(jnp.float32)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, causal: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, on one device. No gradient through the log-sum-exp. interpret: without a TPU, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, and only TPUs need it

    length, heads, width = query.shape[1:]
    padded = -(-length // LANES) * LANES
    query = query * width**-0.5
    query, key, value = (jnp.pad(part, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for part in (query, key, value))
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=-1)
    block = next(size for size in (512, 256, LANES) if padded % size == 0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        use_fused_bwd_kernel=True,
    )
    mask = (splash.CausalMask if causal else splash.FullMask)((padded, padded))

    def run(with_logsumexp: bool):
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=with_logsumexp,
            interpret=interpret,
        )

        def one_row(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array):
            return kernel(query, key, value, splash.SegmentIds(segments, segments))

        return jax.vmap(one_row)

    parts = [part.swapaxes(1, 2) for part in (query, key, value)]  # [N, H, S, D]
    output = run(False)(*parts, segments).swapaxes(1, 2)
    _, (logsumexp,) = run(True)(*map(jax.lax.stop_gradient, parts), segments)
    return output[:, :length], logsumexp.swapaxes(1, 2)[:, :length]
