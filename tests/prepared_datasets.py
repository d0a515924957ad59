"""Small trees of the published layouts, prepared; what their clips should hold, and how masks score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dataset_trees import HEIGHT, WIDTH

from revseg_jax.data.clip import decode_mask
from revseg_jax.data.prepare import prepare
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity


def prepared_clips(dataset: str, tree, tmp_path: Path, split: str, **options):
    out = tmp_path / "out"
    content = prepare(dataset, tree(tmp_path / "in"), out, [split], workers=1, progress=False, **options)
    source = ClipSource([out], split)
    return content, [source[i] for i in range(len(source))], source


def jf(masks: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """In percent, averaged over the frames."""
    return 100 * region_similarity(masks, truth).mean(), 100 * contour_accuracy(masks, truth).mean()


def union(*objects) -> list[np.ndarray]:
    empty = np.zeros((HEIGHT, WIDTH), bool)
    return [np.any([empty if mask is None else mask for mask in frame], 0) for frame in zip(*objects, strict=True)]


def assert_masks(clip, expected: list[np.ndarray]) -> None:
    assert (clip.height, clip.width) == (HEIGHT, WIDTH)
    for t, mask in enumerate(expected):
        np.testing.assert_array_equal(decode_mask(clip.masks[t], HEIGHT, WIDTH), mask)
        assert (clip.masks[t] is None) == (not mask.any())
