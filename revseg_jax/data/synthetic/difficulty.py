"""What makes a synthetic clip easy or hard: one frozen dataclass of knobs and the three named settings."""

from __future__ import annotations

from dataclasses import dataclass

# Raise it whenever a change gives other pixels, masks or queries for the same arguments.
VERSION = 1

SPLITS = ("train", "test")
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (216, 38, 38),
    "green": (36, 168, 58),
    "blue": (40, 82, 224),
    "yellow": (242, 214, 40),
    "purple": (156, 52, 196),
    "cyan": (42, 206, 216),
}
# (colour, shape) pairs that never occur in the train split. Every shape is held out once, in a colour of its own.
HELD_OUT = (("red", "triangle"), ("green", "circle"), ("blue", "star"), ("yellow", "square"))


@dataclass(frozen=True)
class Difficulty:
    """Knobs of a scene. Lengths are pixels of the clip, ranges are inclusive."""

    name: str
    size: int  # height and width of the frames
    frames: tuple[int, int]
    objects: tuple[int, int]
    diameter: tuple[float, float]  # before the change of size over time (factor 0.5 to 1.6)
    contrast: float  # amplitude of the background's brightness texture, grey levels
    chroma: float  # amplitude of the background's colour texture, grey levels
    background_speed: float  # largest speed of the background, pixels a frame
    distinct_colours: bool  # no two objects of a scene share a colour
    colour_jitter: float  # largest deviation from the named colour in each channel, grey levels
    spin: float  # largest rotation, radians a frame
    wall: float  # probability of an occluding wall
    collision: float  # probability that two of the objects collide


DIFFICULTIES = {
    "easy": Difficulty("easy", 128, (8, 16), (3, 3), (20, 45), 14, 4, 1.0, True, 0, 0.0, 0.4, 0.6),
    "medium": Difficulty("medium", 160, (12, 24), (2, 4), (20, 52), 28, 14, 2.0, False, 10, 0.06, 0.5, 0.6),
    "hard": Difficulty("hard", 192, (16, 32), (3, 5), (16, 56), 45, 30, 3.0, False, 18, 0.12, 0.6, 0.7),
}
