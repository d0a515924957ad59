"""`render`: one synthetic clip with exact masks and its queries, a pure function of its arguments."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from revseg_jax.data.synthetic.difficulty import COLOURS, DIFFICULTIES, HELD_OUT, SHAPES, SPLITS, VERSION, Difficulty
from revseg_jax.data.synthetic.drawing import Drawing, draw
from revseg_jax.data.synthetic.motion import Tracks, Wall, sample_wall, simulate
from revseg_jax.data.synthetic.queries import Expression, ask, gather_facts

FPS = 4.0


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str

    @property
    def description(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A clip of T frames with K objects, drawn from back (0) to front (K - 1)."""

    seed: int
    split: str
    difficulty: Difficulty
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]
    tracks: Tracks  # the exact state behind the pixels
    wall: Wall | None
    drawing: Drawing
    fps: float = FPS

    @property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3]"""
        return self.drawing.frames

    @property
    def masks(self) -> np.ndarray:
        """bool [T, K, H, W], the pixels of each object that one sees; all False where it is absent."""
        return self.drawing.masks

    @property
    def boxes(self) -> np.ndarray:
        """float32 [T, K, 4], x1, y1, x2, y2 of the visible pixels, half-open; zeros where absent."""
        columns, rows = self.masks.any(2), self.masks.any(3)
        boxes = [
            columns.argmax(-1),
            rows.argmax(-1),
            columns.shape[-1] - columns[..., ::-1].argmax(-1),
            rows.shape[-1] - rows[..., ::-1].argmax(-1),
        ]
        return (np.stack(boxes, -1) * columns.any(-1)[..., None]).astype(np.float32)

    def reversed(self) -> Scene:
        """The same clip played backwards, with the queries asked anew for the new direction of time."""
        parts = {name: value[::-1] for name, value in vars(self.drawing).items()}
        return _scene(
            self.seed, self.split, self.difficulty, self.objects, self.tracks.reversed(), self.wall, Drawing(**parts)
        )


def render(
    seed: int, difficulty: Difficulty | str, split: str = "train", frames: int | None = None, reverse: bool = False
) -> Scene:
    """The scene of a seed. `frames` overrides the drawn clip length; `reverse` plays it backwards.

    Raises ValueError for an unknown split or difficulty and for fewer than one frame.
    """
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty {difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
        difficulty = DIFFICULTIES[difficulty]
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    rng = _generator(seed, difficulty, split, 0)
    total = int(rng.integers(difficulty.frames[0], difficulty.frames[1] + 1))
    total = total if frames is None else frames
    if total < 1:
        raise ValueError(f"a clip needs at least one frame, not {total}")
    count = int(rng.integers(difficulty.objects[0], difficulty.objects[1] + 1))
    wall = sample_wall(rng, difficulty)
    # Objects get their looks only after their motion: what one looks like says nothing about what it does.
    tracks = simulate(rng, difficulty, total, count, wall)
    if rng.random() < 0.5:
        tracks = tracks.reversed()
    if reverse:
        tracks = tracks.reversed()
    objects = _looks(rng, difficulty, split, count)
    colours = np.array([COLOURS[item.colour] for item in objects], np.float64)
    colours = np.clip(colours + rng.uniform(-1, 1, (count, 3)) * difficulty.colour_jitter, 0, 255)
    drawing = draw(rng, difficulty, tracks, wall, [item.shape for item in objects], colours)
    return _scene(seed, split, difficulty, objects, tracks, wall, drawing)


def _scene(seed, split, difficulty, objects, tracks, wall, drawing) -> Scene:
    names = tuple((item.colour, item.shape) for item in objects)
    facts = gather_facts(names, tracks, difficulty.size, drawing.footprint, drawing.masks, drawing.behind_wall)
    expressions = ask(_generator(seed, difficulty, split, 1), facts)
    return Scene(seed, split, difficulty, objects, expressions, tracks, wall, drawing)


def _generator(seed: int, difficulty: Difficulty, split: str, stream: int) -> np.random.Generator:
    entropy = [VERSION, zlib.crc32(difficulty.name.encode()), SPLITS.index(split), stream, seed]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _looks(rng: np.random.Generator, difficulty: Difficulty, split: str, count: int) -> tuple[SceneObject, ...]:
    """Distinct (colour, shape) pairs. Train never shows a held-out pair; a test scene shows at least one."""
    known = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
    everything = known + list(HELD_OUT)
    pairs = [HELD_OUT[rng.integers(len(HELD_OUT))]] if split == "test" else []
    while len(pairs) < count:
        pool = everything if split == "test" else known
        pair = pool[rng.integers(len(pool))]
        if pair not in pairs and not (difficulty.distinct_colours and any(pair[0] == other for other, _ in pairs)):
            pairs.append(pair)
    return tuple(SceneObject(shape, colour) for colour, shape in (pairs[i] for i in rng.permutation(count)))
