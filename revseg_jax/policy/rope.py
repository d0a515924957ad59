"""Rotary positions: three-axis mRoPE for the decoder, two-axis for the vision tower (Qwen2.5-VL, arXiv 2502.13923)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.policy.config import ModelConfig, TextConfig, VisionConfig


def decoder_rotation(text: TextConfig, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """positions int32 [3, ...] (time, height, width) -> cos, sin [..., head_dim], float32 or the wider `dtype`.

    Frequency j follows the axis of the `mrope_section` that holds it; text tokens have three equal positions.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    half = text.head_dim // 2
    inverse_frequency = _inverse_frequencies(text.rope_theta, half)
    axis_of_frequency = np.repeat(np.arange(3), text.mrope_section)
    angles = jnp.moveaxis(positions.astype(wide)[axis_of_frequency], 0, -1) * inverse_frequency
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., heads, head_dim] with cos, sin [..., head_dim]; halves are rotated, as in Llama. In float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * cos[..., None, :] + turned * sin[..., None, :]).astype(x.dtype)


def vision_angles(vision: VisionConfig, places: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """places int [..., 2], row and column of each patch in its frame -> angles float32 [..., head_dim]."""
    quarter = vision.head_dim // 4
    inverse_frequency = _inverse_frequencies(10000.0, quarter)
    angles = places.astype(np.float32)[..., None] * inverse_frequency
    angles = angles.reshape(*places.shape[:-1], 2 * quarter)
    return (np if isinstance(angles, np.ndarray) else jnp).concatenate([angles, angles], axis=-1)


def _inverse_frequencies(theta: float, count: int) -> np.ndarray:
    """float32 [count]: theta^(-j / count), rounded where transformers rounds, since positions multiply the difference.

    NumPy's float32 power is not used: its last digit is not torch's, and depends on the processor.
    """
    power = theta ** (np.arange(count, dtype=np.float32) / np.float32(count)).astype(np.float64)
    return np.float32(1) / power.astype(np.float32)


def merge_order(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch in the order the tower reads them: merge x merge squares, row by row."""
    rows, columns = np.mgrid[:height, :width]

    def in_squares(grid: np.ndarray) -> np.ndarray:
        squares = grid.reshape(height // merge, merge, width // merge, merge)
        return squares.transpose(0, 2, 1, 3).reshape(-1)

    return in_squares(rows), in_squares(columns)


def sequence_positions(
    tokens: np.ndarray, config: ModelConfig, grids: list[tuple[int, int, int]], seconds_per_grid: list[float]
) -> np.ndarray:
    """mRoPE positions int32 [3, length] of one unpadded token sequence [length].

    `grids` holds (time, height, width) in patches for every image and video in order of appearance;
    `seconds_per_grid` the seconds one temporal patch covers, for every video in order. A visual block starts where the
    text before it ends, spans its merged grid, and the text goes on after the larger of its height and width.

    This is the rule of transformers 5. Before 5.3 (and in the models' training) the text went on after the largest
    position, time included: the same unless a video's time axis is longer than its sides (448 pixels: above 16 frames
    at 2 fps).
    """
    merge = config.vision.spatial_merge_size
    visual = (config.image_token_id, config.video_token_id)
    positions = np.zeros((3, len(tokens)), np.int32)
    videos, images = iter(seconds_per_grid), iter(grids)
    index, start = 0, 0
    while index < len(tokens):
        if tokens[index] not in visual:
            positions[:, index] = start
            index, start = index + 1, start + 1
            continue
        time, height, width = next(images)
        height, width = height // merge, width // merge
        # All in float32, because the products are cut to integers and must be cut as torch cuts them.
        seconds = np.float32(next(videos) if tokens[index] == config.video_token_id else 0)
        block = np.indices((time, height, width)).reshape(3, -1)
        steps = np.arange(time, dtype=np.float32) * (seconds * np.float32(config.vision.tokens_per_second))
        block[0] = steps.astype(np.int64).repeat(height * width)
        positions[:, index : index + block.shape[1]] = start + block
        index, start = index + block.shape[1], start + max(height, width)
    return positions
