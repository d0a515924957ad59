"""uint8 frames to the vision tower's patches, on the device: only uint8 crosses from the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.policy.config import VisionConfig

# CLIP's channel statistics, which Qwen2.5-VL's image processor uses.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def patchify(frames: jax.Array, vision: VisionConfig, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """frames uint8 [B, N, H, W, 3] -> normalised patches `dtype` [B, N / temporal, H * W / patch^2, patch_dim].

    Patches stand in merge order (merge x merge squares, row by row); inside a patch the order is channel, frame, row,
    column, as the Hugging Face processor flattens them. H and W are multiples of patch_size * spatial_merge_size.
    """
    batch, count, height, width, channels = frames.shape
    patch, merge, temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    pixels = (frames.astype(dtype) - 255 * MEAN) / (255 * STD)  # the processor's order: equal to the last bit
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = pixels.reshape(batch, count // temporal, temporal, rows, merge, patch, columns, merge, patch, channels)
    #                        b      t                f         r     m      p      c        n      q      x
    blocks = jnp.einsum("btfrmpcnqx->btrcmnxfpq", blocks)
    return blocks.reshape(batch, count // temporal, rows * columns * merge * merge, -1)
