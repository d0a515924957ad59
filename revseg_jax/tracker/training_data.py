"""Training batches for the embedded tracker, cut from synthetic clips, and the box prompts training and scoring share.

A batch is a pure function of (seed, step): a loader process can make it ahead of time without changing the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from revseg_jax.data.frames import resize_square
from revseg_jax.data.synthetic import DIFFICULTIES, render
from revseg_jax.tracker.training_step import Batch

MIN_PIXELS = 16  # an object with fewer visible pixels is not prompted: its box would be all jitter
_CLIP_SEEDS = 2**31


@dataclass(frozen=True)
class Phase:
    """A stretch of the training schedule."""

    until: float  # the fraction of all steps at which it ends
    clips: int  # windows a step
    length: int  # frames a window
    tracked: bool  # False: single frames only
    foreground: float  # weight of the auxiliary foreground loss
    forced: float  # the probability that a step's memories take the object score from the truth


def jittered_box(box: np.ndarray, spread: float, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """float64 [4] xyxy, each edge of `box` moved by a normal deviate of `spread` box sides, at most 15 %.

    The result stays inside a frame of size (height, width).
    """
    sides = np.tile(box[2:] - box[:2], 2)
    moved = box + np.clip(rng.normal(0, spread, 4), -0.15, 0.15) * sides
    return np.clip(moved, 0, [size[1], size[0], size[1], size[0]])


def box_of(mask: np.ndarray) -> np.ndarray:
    """float64 [4]: half-open xyxy box in pixels around the True pixels of bool [H, W]; there must be some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def make_batch(seed: int, step: int, phase: Phase, size: int) -> Batch:
    """`phase.clips` windows of training clips, three in four of them easy, the others of medium difficulty.

    All share the place of the keyframe in the window; up to three objects visible there are prompted in each.
    """
    rng = np.random.default_rng([seed, step])
    key = int(rng.integers(phase.length))
    frames, foreground, masks, clip_of = [], [], [], []
    while len(frames) < phase.clips:
        difficulty = DIFFICULTIES["easy" if rng.random() < 0.75 else "medium"]
        scene = render(int(rng.integers(_CLIP_SEEDS)), difficulty, "train")
        visible = scene.masks.sum((2, 3)) >= MIN_PIXELS  # [T, K]
        starts = np.arange(len(scene.frames) - phase.length + 1)
        starts = starts[visible[starts + key].any(1)]
        if not len(starts):
            continue
        start = int(rng.choice(starts))
        objects = rng.permutation(np.flatnonzero(visible[start + key]))[:3]
        window = scene.frames[start : start + phase.length]
        clip_of += [len(frames)] * len(objects)
        frames.append(np.stack([resize_square(frame, size) for frame in window]))
        foreground.append(_resize_masks(scene.masks[start : start + phase.length].any(1), size))
        masks += [_resize_masks(scene.masks[start : start + phase.length, k], size) for k in objects]
    truth = np.stack(masks)
    boxes = np.zeros((*truth.shape[:2], 4), np.float32)
    for b, t in zip(*np.nonzero(truth.any((2, 3))), strict=True):
        spread = 0.06 if rng.random() < 0.8 else 0.12
        boxes[b, t] = jittered_box(box_of(truth[b, t]), spread, (size, size), rng)
    tensors = (
        torch.from_numpy(array) for array in (np.stack(frames), np.stack(foreground), truth, np.array(clip_of), boxes)
    )
    return Batch(*tensors, keyframe=key)


def _resize_masks(masks: np.ndarray, size: int) -> np.ndarray:
    """bool [T, H, W] -> [T, size, size]: True where more than half of the area was."""
    if masks.shape[1:] == (size, size):
        return masks
    return np.stack([np.asarray(Image.fromarray(m).convert("L").resize((size, size), Image.BOX)) > 127 for m in masks])


class Steps(Dataset):
    """The batch of every training step, for a DataLoader that makes them in a process of its own."""

    def __init__(self, seed: int, phases: list[Phase], size: int):
        self.seed, self.phases, self.size = seed, phases, size  # phases: one entry a step

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, step: int) -> Batch:
        return make_batch(self.seed, step, self.phases[step], self.size)
