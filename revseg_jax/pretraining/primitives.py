"""Conversations that teach the primitive skills, written from a scene's exact state.

The embedded policy stands in for a pretrained vision-language model: it can answer in format, name objects, box a
described object on a given frame and tell where an object is biggest, each when it is asked just that. In whole
conversations its keyframes are random visible frames and its boxes are loose: what makes a good keyframe and a good
box for segmentation is left to reinforcement learning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from revseg_jax.chain.prompts import IMAGE, turn1_answer, turn1_text, turn2_answer, turn2_text
from revseg_jax.config import ChainConfig
from revseg_jax.data.synthetic import Scene

BOX_GRID = 4  # coordinates are written as multiples of this many pixels: few, frequent number tokens
# In whole conversations this share of the boxes is exact. The others only say in which half of the image the object
# is, or nothing: the embedded tracker forgives smaller errors. J over a clip is 0.81 from exact boxes, 0.57 from the
# quarter of the image around the object, 0.36 from half of it, 0.27 from all of it (48 held-out easy clips, random
# keyframes).
EXACT = 0.3
BEFORE_NAME = "it is the"  # how a thought begins
MEANING_WEIGHT = 4.0  # of a token of an answer that names what a query means, the hardest and rarest of all tokens


@dataclass(frozen=True)
class Turn:
    """A user's text (with the image placeholder where the keyframe goes) and the answer to it.

    Where the answer decides which object a query means: that object, and the part of the answer before its name.
    """

    user: str
    answer: str
    target: int | None = None
    before_name: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns that follow the video, the sampled frame shown as the image (None: the turns show none), and how much a
    token of the answers counts in training."""

    turns: tuple[Turn, ...]
    image_frame: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class View:
    """A scene as the policy sees it: N sampled frames.

    Attributes:
      boxes: float [N, K, 4] in pixels of the clip, half-open; zeros where absent
      visible: bool [N, K]
    """

    scene: Scene
    sampled: np.ndarray  # int [N], frames of the clip
    boxes: np.ndarray
    visible: np.ndarray

    @property
    def names(self) -> list[str]:
        return [item.description for item in self.scene.objects]

    @property
    def areas(self) -> np.ndarray:
        """float [N, K], of the boxes in pixels of the clip; 0 where absent"""
        return (self.boxes[..., 2] - self.boxes[..., 0]) * (self.boxes[..., 3] - self.boxes[..., 1])

    @property
    def size(self) -> int:
        """Side of the square clip in pixels."""
        return self.scene.frames.shape[1]


def view(scene: Scene, sampled: np.ndarray) -> View:
    boxes = scene.boxes[sampled]
    return View(scene, sampled, boxes, boxes[..., 2] > boxes[..., 0])


def grid_box(box: np.ndarray, clip_size: int, image_size: int) -> list[int]:
    """A box of the clip in pixels of the resized image, rounded to the grid and never empty."""
    scaled = np.round(np.asarray(box, np.float64) * image_size / clip_size / BOX_GRID).astype(int)
    scaled[2:] = np.maximum(scaled[2:], scaled[:2] + 1)
    return (scaled * BOX_GRID).tolist()


def loosen(rng: np.random.Generator, box: np.ndarray, size: float) -> np.ndarray:
    """Now and then the x1, y1, x2, y2 box itself, else a half of the image that holds it, or the whole image where none
    does. size: the image's side."""
    if rng.random() < EXACT:
        return box
    halves = np.array([[0, 0, 1, 2], [1, 0, 2, 2], [0, 0, 2, 1], [0, 1, 2, 2]]) * size / 2
    holding = halves[(halves[:, :2] <= box[:2]).all(1) & (halves[:, 2:] >= box[2:]).all(1)]
    return holding[rng.integers(len(holding))] if len(holding) else np.array([0.0, 0.0, size, size])


def keyframe_answer(seen: View, chain: ChainConfig, k: int, frame: int) -> str:
    """A first answer about object k. It thinks aloud how large the object is in each of the N frames: the side of a
    square of its box's area, in pixels of the frame as shown."""
    sides = np.sqrt(seen.areas[:, k]) * chain.frame_size / seen.size
    sizes = ", ".join(map(str, np.round(sides / BOX_GRID).astype(int) * BOX_GRID))
    return turn1_answer(f"{BEFORE_NAME} {seen.names[k]}: {sizes}", frame, seen.names[k])


def chain_conversation(rng: np.random.Generator, seen: View, chain: ChainConfig) -> Conversation | None:
    """Both turns about one of the scene's expressions: a random visible keyframe and a loose box."""
    usable = [item for item in seen.scene.expressions if seen.visible[:, item.target].any()]
    if not usable:
        return None
    # Kinds in equal parts, or else the many referring expressions would crowd out the harder ones.
    kind = str(rng.choice(sorted({item.kind for item in usable})))
    of_kind = [item for item in usable if item.kind == kind]
    expression = of_kind[rng.integers(len(of_kind))]
    target, name = expression.target, seen.names[expression.target]
    frame = int(rng.choice(np.flatnonzero(seen.visible[:, target])))
    box = grid_box(loosen(rng, seen.boxes[frame, target], seen.size), seen.size, chain.keyframe_size)
    seconds = len(seen.scene.frames) / seen.scene.fps
    first = turn1_text(chain, expression.query, len(seen.sampled), seconds)
    turns = (
        Turn(first, keyframe_answer(seen, chain, target, frame), target, f"<think>{BEFORE_NAME}"),
        Turn(IMAGE + turn2_text(chain, name), turn2_answer(box, name)),
    )
    return Conversation(turns, frame)


def box_conversation(rng: np.random.Generator, seen: View, chain: ChainConfig) -> Conversation:
    """One frame at keyframe size and the exact box of every object in it, once in the format of whole conversations and
    then as bare numbers, which say as much about places in a third of the tokens."""
    frame = int(rng.choice(np.flatnonzero(seen.visible.any(1))))
    turns = []
    for k in rng.permutation(np.flatnonzero(seen.visible[frame])):
        box, name = grid_box(seen.boxes[frame, k], seen.size, chain.keyframe_size), seen.names[k]
        if turns:
            turns.append(Turn(f"Locate '{name}'", str(box)))
        else:
            turns.append(Turn(IMAGE + f"Detect exactly '{name}'", turn2_answer(box, name)))
    return Conversation(tuple(turns), frame)


def biggest_turn(seen: View, chain: ChainConfig, k: int) -> Turn:
    """In which of the sampled frames object k's box has the largest area."""
    answer = keyframe_answer(seen, chain, k, int(seen.areas[:, k].argmax()))
    return Turn(f"In which frame is the {seen.names[k]} biggest?", answer)


def video_conversation(rng: np.random.Generator, seen: View, chain: ChainConfig) -> Conversation:
    """What there is in the video and when each thing is biggest, in random order; the packing keeps what fits."""
    turns = [Turn("Which objects are there?", ", ".join(sorted(seen.names)))]
    turns += [biggest_turn(seen, chain, int(k)) for k in np.flatnonzero(seen.visible.any(0))]
    return Conversation(tuple(turns[i] for i in rng.permutation(len(turns))))


def meaning_conversation(rng: np.random.Generator, seen: View) -> Conversation:
    """What each of the scene's queries means, in random order."""
    asked = [seen.scene.expressions[i] for i in rng.permutation(len(seen.scene.expressions))]
    turns = tuple(Turn(f"What is meant by {e.query!r}?", seen.names[e.target], e.target) for e in asked)
    return Conversation(
        turns or (Turn("Which objects are there?", ", ".join(sorted(seen.names))),), None, MEANING_WEIGHT
    )


def conversations(
    rng: np.random.Generator, seen: View, chain: ChainConfig, chains: int, boxes: int, videos: int, meanings: int
) -> list[Conversation]:
    """That many conversations about one clip; a clip without a query to ask gives boxes in place of a chain."""
    talks = [chain_conversation(rng, seen, chain) or box_conversation(rng, seen, chain) for _ in range(chains)]
    talks += [box_conversation(rng, seen, chain) for _ in range(boxes)]
    talks += [video_conversation(rng, seen, chain) for _ in range(videos)]
    return talks + [meaning_conversation(rng, seen) for _ in range(meanings)]


def corpus(scenes: list[Scene], chain: ChainConfig, seed: int) -> list[str]:
    """Texts from which the tokenizer's vocabulary is learned: every prompt and answer of some conversations."""
    rng = np.random.default_rng(seed)
    texts = []
    for scene in scenes:
        seen = view(scene, np.arange(min(chain.frames, len(scene.frames))))
        for conversation in conversations(rng, seen, chain, 4, 1, 1, 1):
            for turn in conversation.turns:
                texts += [turn.user, turn.answer]
    return texts
