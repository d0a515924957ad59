"""Conversations as transformers' processor writes them, packed on the host into arrays of few different shapes.

Images and videos of all sizes become one array of patches with index tables, and every size is rounded up to a bucket,
so that what runs on the devices compiles once a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from revseg_jax.errors import InputError
from revseg_jax.policy.config import ModelConfig, VisionConfig
from revseg_jax.policy.rope import sequence_positions
from revseg_jax.policy.vision import window_layout

SMALLEST_LENGTH = 64  # tokens


class PackedVision(NamedTuple):
    """The temporal slices of all images and videos, window by window, several to a row (see `VisionTower.packed`).

    Attributes:
      patches: float32 [rows, windows, slots, patch_dim]
      places: int32 [rows, windows, slots, 2], row and column of the patch in its grid
      segments: int32 [rows, windows, slots], 1, 2, ... for the slices of a row, 0 for padding
    """

    patches: np.ndarray
    places: np.ndarray
    segments: np.ndarray


class PackedConversations(NamedTuple):
    """Attributes:
    tokens: int32 [B, L], the real ones of a row first, padding after them
    positions: int32 [B, 3, L]
    slots: int32 [B, L], where the tokens stand here, in the order in which they came
    features: int32 [B, L], which feature of the packed vision a visual token takes; -1 for text
    vision: None for text alone
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    features: np.ndarray
    vision: PackedVision | None


def bucket(count: int, smallest: int = 1) -> int:
    """The smallest of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that holds `count`: two sizes an octave."""
    size = smallest
    while size < count:
        size *= 2
    between = size * 3 // 4
    return between if max(count, smallest) <= between and size % 4 == 0 else size


def row_length(count: int, lengths: Sequence[int]) -> int:
    """The slots of rows of `count` tokens. Raises InputError when there are `lengths` and none holds them."""
    if not lengths:
        return bucket(count, SMALLEST_LENGTH)
    if count > max(lengths):
        raise InputError(f"a row of {count} tokens is longer than the longest of lengths={list(lengths)}")
    return min(length for length in lengths if length >= count)


def pack(
    config: ModelConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    second_per_grid_ts: np.ndarray | None = None,
    lengths: Sequence[int] = (),
) -> PackedConversations:
    """A batch of conversations from the output of transformers' processor.

    input_ids, attention_mask int [B, length]; pixel_values and pixel_values_videos [patches, patch_dim] of all images
    and of all videos, in order of appearance; their grids int [n, 3] (time, height, width) in patches;
    second_per_grid_ts [videos], seconds of one temporal patch (default 1, as in transformers). lengths: that rows may
    have, in tokens; default: those of `bucket` from 64 on.
    Raises InputError when tokens, grids and pixels do not belong together, or when no length holds the rows.
    """
    tokens = np.asarray(input_ids, np.int32)
    mask = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise InputError(f"input_ids {tokens.shape} and attention_mask {mask.shape} must both be [batch, length]")
    if mask.any() and not 0 <= tokens[mask].min() <= tokens[mask].max() < config.text.vocab_size:
        strange = [int(extreme) for extreme in (tokens[mask].min(), tokens[mask].max())]
        raise InputError(f"input_ids lie in {strange}, not in the vocabulary 0..{config.text.vocab_size - 1}")
    images = read_grids(config.vision, pixel_values, image_grid_thw, "image")
    videos = read_grids(config.vision, pixel_values_videos, video_grid_thw, "video")
    seconds = [1.0] * len(videos) if second_per_grid_ts is None else [float(s) for s in np.ravel(second_per_grid_ts)]
    if len(seconds) != len(videos):
        raise InputError(f"second_per_grid_ts has {len(seconds)} values for {len(videos)} videos")

    rows, length = tokens.shape
    shape = bucket(rows), row_length(length, lengths)
    packed = PackedConversations(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros((shape[0], 3, shape[1]), np.int32),
        slots=np.zeros(shape, np.int32),
        features=np.full(shape, -1, np.int32),
        vision=None,
    )
    packed.slots[:rows, :length] = np.argsort(np.argsort(~mask, axis=1, kind="stable"), axis=1)
    image_queue, video_queue, seconds_queue = iter(images), iter(videos), iter(seconds)
    for row in range(rows):
        real = tokens[row, mask[row]]
        grids, kinds = visuals_in_order(real, config, image_queue, video_queue)
        durations = [next(seconds_queue) for kind in kinds if kind == config.video_token_id]
        packed.tokens[row, : len(real)] = real
        packed.positions[row, :, : len(real)] = sequence_positions(real, config, grids, durations)
    unused = len(list(image_queue)) + len(list(video_queue))
    if unused:
        raise InputError(f"{unused} images or videos have no tokens in input_ids")
    if not images and not videos:
        return packed
    # Images first, then videos: each kind of token takes its features in order.
    pixels = [np.asarray(part) for part, grids in ((pixel_values, images), (pixel_values_videos, videos)) if grids]
    vision, order = pack_vision(config.vision, pixels, images + videos)
    real = np.arange(shape[1]) < np.pad(mask.sum(1), (0, shape[0] - rows))[:, None]
    is_image, is_video = (real & (packed.tokens == t) for t in (config.image_token_id, config.video_token_id))
    count = is_image.sum()
    packed.features[is_image], packed.features[is_video] = order[:count], order[count:]
    return packed._replace(vision=vision)


def read_grids(
    vision: VisionConfig, pixels: np.ndarray | None, grids: np.ndarray | None, kind: str
) -> list[tuple[int, int, int]]:
    """(time, height, width) of every image or video, checked against the pixels."""
    if grids is None and pixels is None:
        return []
    if grids is None or pixels is None:
        raise InputError(f"{kind}s need both their pixel values and {kind}_grid_thw")
    read = [tuple(int(size) for size in grid) for grid in np.asarray(grids).reshape(-1, 3)]
    for time, height, width in read:
        if height % vision.spatial_merge_size or width % vision.spatial_merge_size or min(time, height, width) < 1:
            raise InputError(
                f"{kind} grid {time}x{height}x{width} (time x height x width in patches): height and width must be "
                f"multiples of {vision.spatial_merge_size}"
            )
    expected = (sum(time * height * width for time, height, width in read), vision.patch_dim)
    if np.shape(pixels) != expected:
        raise InputError(
            f"pixel values of the {kind}s have shape {np.shape(pixels)}, not {expected} as their grids say"
        )
    return read


def visuals_in_order(
    tokens: np.ndarray, config: ModelConfig, images: Iterator, videos: Iterator
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Takes the grids that one unpadded row of tokens shows from the queues: grids, and the token of each."""
    queues = {config.image_token_id: images, config.video_token_id: videos}
    visual = np.isin(tokens, list(queues))
    grids, kinds, index = [], [], 0
    while visual[index:].any():
        index += int(np.argmax(visual[index:]))
        kind = int(tokens[index])
        name = "image" if kind == config.image_token_id else "video"
        grid = next(queues[kind], None)
        if grid is None:
            raise InputError(f"input_ids show more {name}s than {name}_grid_thw has rows")
        count = grid[0] * grid[1] * grid[2] // config.vision.spatial_merge_size**2
        if (tokens[index : index + count] != kind).any() or index + count > len(tokens):
            raise InputError(f"the {name} of grid {'x'.join(map(str, grid))} needs {count} {name} tokens in one block")
        grids.append(grid)
        kinds.append(kind)
        index += count
    return grids, kinds


def pack_vision(
    vision: VisionConfig, pixels: list[np.ndarray], grids: list[tuple[int, int, int]]
) -> tuple[PackedVision, np.ndarray]:
    """Lays out all slices; pixels [patches, patch_dim] stand in the order of the grids, in one or more pieces.

    Returns the layout and int [tokens], where the feature of each merged patch stands in it.
    """
    layouts = [window_layout(vision, height, width) for time, height, width in grids for _ in range(time)]
    merged = vision.spatial_merge_size**2
    slots = vision.window_side**2 * merged
    rows, windows, starts = place_slices([len(layout.real) for layout in layouts])
    patches = np.zeros((rows, windows, slots, vision.patch_dim), np.float32)
    places = np.zeros((rows, windows, slots, 2), np.int32)
    segments = np.zeros((rows, windows, slots), np.int32)
    order, end, piece, pieces = [], 0, pixels[0], iter(pixels[1:])
    for (row, start, number), layout in zip(starts, layouts, strict=True):
        if end == len(piece):
            piece, end = next(pieces), 0
        begin, end = end, end + len(layout.scatter) * merged
        count, filled = layout.real.shape  # a grid smaller than a window fills fewer slots of each
        here = (row, slice(start, start + count), slice(filled))
        patches[here] = piece[begin:end][layout.gather].reshape(count, filled, -1)
        places[here] = layout.places.reshape(count, filled, 2)
        segments[here] = layout.real * number
        window, slot = np.divmod(layout.scatter, filled // merged)
        order.append((row * windows + start + window) * (slots // merged) + slot)
    return PackedVision(patches, places, segments), np.concatenate(order)


def place_slices(sizes: list[int]) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Packs slices of `sizes` windows into rows that hold the largest, first fit from the largest down.

    Returns the rows and windows of a row, both buckets, and for each slice its row, first window and number (from 1)
    among the slices of its row.
    """
    windows = bucket(max(sizes))
    used: list[int] = []
    numbers: list[int] = []
    places = [(0, 0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        row = next((row for row, filled in enumerate(used) if filled + sizes[index] <= windows), len(used))
        if row == len(used):
            used.append(0)
            numbers.append(0)
        numbers[row] += 1
        places[index] = (row, used[row], numbers[row])
        used[row] += sizes[index]
    return bucket(len(used)), windows, places
