"""Pixels and exact masks of a scene. float64 throughout, so that rounding to grey levels agrees across platforms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from revseg_jax.data.synthetic.difficulty import Difficulty
from revseg_jax.data.synthetic.motion import Tracks, Wall

# Corner distances in units of the nominal radius, chosen so that all shapes look about equally large.
SQUARE, TRIANGLE, STAR = 0.9, 1.3, 1.4
REACH = 1.42  # no shape extends further than this many nominal radii


@dataclass(frozen=True)
class Drawing:
    """What `draw` returns. `masks` are the pixels one sees; `footprint` and `behind_wall` ignore other objects."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    masks: np.ndarray  # bool [T, K, H, W]
    footprint: np.ndarray  # int64 [T, K], pixels of the object inside the frame were nothing in front of it
    behind_wall: np.ndarray  # float64 [T, K], share of the footprint that the wall covers; 0 outside the frame


def outline(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside; a lower bound of it near corners) from the outline at (x, y)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE * radius
    if shape == "triangle":  # three half planes; one corner points up
        slope = math.sqrt(3) / 2
        return np.maximum(y, slope * np.abs(x) - 0.5 * y) - 0.5 * TRIANGLE * radius
    # Five-pointed star: a pentagram is where at least four of its five half planes hold.
    planes = np.stack([x * math.sin(a) - y * math.cos(a) for a in np.arange(5) * 2 * math.pi / 5])
    return np.partition(planes, 3, axis=0)[3] - STAR * math.cos(2 * math.pi / 5) * radius


def draw(
    rng: np.random.Generator,
    difficulty: Difficulty,
    tracks: Tracks,
    wall: Wall | None,
    shapes: list[str],
    colours: np.ndarray,
) -> Drawing:
    """Draws objects 0..K-1 from back to front. `colours` is float64 [K, 3] in grey levels."""
    count, size = len(shapes), difficulty.size
    total = len(tracks.centres)
    texture = _texture(rng, difficulty)
    bricks = _bricks(rng, size, wall)
    frames = np.empty((total, size, size, 3), np.uint8)
    masks = np.zeros((total, count, size, size), bool)
    footprint, behind = np.zeros((total, count), np.int64), np.zeros((total, count))
    for t in range(total):
        shift = np.floor(tracks.background[t] + 0.5).astype(int)
        frames[t] = np.roll(texture, (shift[1], shift[0]), (0, 1))
        for k in range(count):
            _draw_object(frames[t], masks[t], k, shapes[k], colours[k], tracks, t)
        footprint[t] = masks[t].sum((1, 2))
        # The footprint must ignore objects in front, so visibility is settled only now, from front to back.
        covered = np.zeros((size, size), bool)
        if wall is not None:
            band = slice(wall.start, wall.stop)
            where = (band, slice(None)) if wall.horizontal else (slice(None), band)
            covered[where] = True
            frames[t][where] = bricks[where]
            behind[t] = (masks[t] & covered).sum((1, 2)) / np.maximum(footprint[t], 1)
        for k in reversed(range(count)):
            whole = masks[t, k].copy()
            masks[t, k] &= ~covered
            covered |= whole
    return Drawing(frames, masks, footprint, behind)


def _draw_object(frame, masks, k, shape, colour, tracks, t) -> None:
    """Blends one object into the frame, with a soft edge a pixel wide; its mask is where it covers at least half."""
    size = len(frame)
    (cx, cy), radius = tracks.centres[t, k], tracks.radii[t, k]
    reach = REACH * radius + 1
    x0, x1 = max(math.floor(cx - reach), 0), min(math.ceil(cx + reach), size)
    y0, y1 = max(math.floor(cy - reach), 0), min(math.ceil(cy + reach), size)
    if x0 >= x1 or y0 >= y1:
        return
    dx, dy = np.arange(x0, x1)[None, :] + 0.5 - cx, np.arange(y0, y1)[:, None] + 0.5 - cy
    cos, sin = math.cos(tracks.angles[t, k]), math.sin(tracks.angles[t, k])
    distance = outline(shape, dx * cos + dy * sin, dy * cos - dx * sin, radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    light = (1 - 0.16 * dy / radius) * np.where(distance > -1.2, 0.62, 1.0)  # lit from above, with a dark rim
    window = frame[y0:y1, x0:x1]
    blend = window * (1 - cover) + np.clip(colour * light[..., None], 0, 255) * cover
    frame[y0:y1, x0:x1] = np.floor(blend + 0.5).astype(np.uint8)
    masks[k, y0:y1, x0:x1] = distance <= 0


def _texture(rng: np.random.Generator, difficulty: Difficulty) -> np.ndarray:
    """A background that tiles without a seam: smooth noise at three scales. uint8 [size, size, 3]."""
    size = difficulty.size
    grey = rng.uniform(90, 165)
    tint = rng.uniform(-1, 1, 3) * difficulty.chroma
    result = np.full((size, size, 3), grey) + tint
    for cells, share in ((4, 0.5), (8, 0.3), (16, 0.2)):
        noise = rng.uniform(-1, 1, (cells, cells, 1)) * difficulty.contrast
        noise = noise + rng.uniform(-1, 1, (cells, cells, 3)) * difficulty.chroma
        position = np.arange(size) * cells / size
        left = position.astype(int)
        ease = position - left
        ease = (ease * ease * (3 - 2 * ease))[:, None, None]
        rows = noise[left] * (1 - ease) + noise[(left + 1) % cells] * ease
        ease = ease[:, 0][None]
        result += 1.6 * share * (rows[:, left] * (1 - ease) + rows[:, (left + 1) % cells] * ease)
    return np.floor(np.clip(result, 0, 255) + 0.5).astype(np.uint8)


def _bricks(rng: np.random.Generator, size: int, wall: Wall | None) -> np.ndarray:
    """The wall's look over the whole frame: dark grey-brown bricks. uint8 [size, size, 3]."""
    grey = rng.uniform(52, 74)
    if wall is None:
        return np.zeros((0, 0, 3), np.uint8)
    y, x = np.mgrid[:size, :size]
    row = y // 8
    mortar = (y % 8 == 0) | ((x + 8 * (row % 2)) % 16 == 0)
    tone = grey + 7.0 * ((row * 7 + (x + 8 * (row % 2)) // 16 * 5) % 3 - 1) + 38.0 * mortar
    return np.floor(tone[..., None] * np.array([1.0, 0.9, 0.8]) + 0.5).astype(np.uint8)
