"""J and F against hand-made cases, their properties, and a pixel-by-pixel reference written from the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from revseg_jax.evaluation.metrics import boundary_map, contour_accuracy, region_similarity


def brute_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    """A pixel is on the boundary when its right, lower or lower-right neighbour differs. On the last row only the
    right one counts, on the last column only the lower one, in the last corner none."""
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            steps = [(0, 1), (1, 0), (1, 1)]
            inside = [(y + dy, x + dx) for dy, dx in steps if y + dy < height and x + dx < width]
            if any(mask[y, x] != mask[p] for p in inside):
                found.add((y, x))
    return found


def brute_j(pred: np.ndarray, truth: np.ndarray) -> float:
    a, b = (set(np.flatnonzero(mask).tolist()) for mask in (pred, truth))
    return len(a & b) / len(a | b) if a | b else 1.0


def j_measure(pred: np.ndarray, truth: np.ndarray) -> float:
    return region_similarity(pred[None], truth[None])[0]


def f_measure(pred: np.ndarray, truth: np.ndarray) -> float:
    return contour_accuracy(pred[None], truth[None])[0]


def brute_f(pred: np.ndarray, truth: np.ndarray) -> float:
    radius = math.ceil(0.008 * math.sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2))
    a, b = brute_boundary(pred), brute_boundary(truth)
    if not a and not b:
        return 1.0
    if not a or not b:
        return 0.0
    disk = [
        (dy, dx)
        for dy in range(-radius, radius + 1)
        for dx in range(-radius, radius + 1)
        if dy * dy + dx * dx <= radius * radius
    ]
    grown_a = {(y + dy, x + dx) for y, x in a for dy, dx in disk}
    grown_b = {(y + dy, x + dx) for y, x in b for dy, dx in disk}
    precision, recall = len(a & grown_b) / len(a), len(b & grown_a) / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rectangle(height: int, width: int, y1: int, x1: int, y2: int, x2: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def random_masks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two unions of rectangles that may be empty, touch the borders or fill the image, with some noise."""
    height, width = rng.integers(1, 150, 2)
    masks = []
    for _ in range(2):
        mask = rng.random((height, width)) < rng.choice([0, 0, 0, 0.01])
        for _ in range(rng.integers(0, 3)):
            y, x = rng.integers(-10, height + 10), rng.integers(-10, width + 10)
            mask[max(y, 0) : max(y + rng.integers(1, 60), 0), max(x, 0) : max(x + rng.integers(1, 60), 0)] ^= True
        masks.append(mask)
    if rng.random() < 0.3:
        masks[1] = np.roll(masks[0], rng.integers(-3, 4, 2), (0, 1))
    return masks[0], masks[1]


PAIRS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
)


def test_j_by_hand() -> None:
    left, right = rectangle(4, 8, 0, 0, 4, 4), rectangle(4, 8, 0, 2, 4, 6)
    assert j_measure(left, right) == pytest.approx(8 / 24)
    assert j_measure(left, np.zeros_like(left)) == 0
    assert j_measure(np.zeros_like(left), np.zeros_like(left)) == 1


def test_boundary_by_hand() -> None:
    ring = {(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)}  # half a pixel towards the origin
    square = rectangle(5, 5, 2, 2, 4, 4)
    assert {tuple(p) for p in np.argwhere(boundary_map(square))} == brute_boundary(square) == ring
    full = np.ones((5, 7), bool)
    assert not boundary_map(full).any()  # nothing differs from a neighbour, so a full mask has no contour
    last_row = rectangle(3, 4, 2, 1, 3, 3)
    assert {tuple(p) for p in np.argwhere(boundary_map(last_row))} == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)}


def test_f_by_hand() -> None:
    empty = np.zeros((100, 100), bool)  # the tolerance is ceil(0.008 * 141.4) = 2 pixels
    square = rectangle(100, 100, 30, 30, 60, 60)
    assert f_measure(square, square) == 1
    assert f_measure(square, empty) == f_measure(empty, square) == 0
    assert f_measure(empty, empty) == 1
    assert f_measure(np.ones_like(empty), empty) == 1  # J is 0 here, but neither has a contour
    assert f_measure(square, rectangle(100, 100, 32, 30, 62, 60)) == 1  # moved by the tolerance
    assert 0 < f_measure(square, rectangle(100, 100, 33, 30, 63, 60)) < 1  # one pixel further
    assert f_measure(square, rectangle(100, 100, 70, 70, 90, 90)) == 0


def test_tolerance_is_a_disk() -> None:
    """A diagonal neighbour two rows and two columns away lies outside a disk of radius 2, inside its square."""
    dot, straight, diagonal = (rectangle(100, 100, y, x, y + 1, x + 1) for y, x in ((50, 50), (52, 50), (52, 52)))
    assert f_measure(dot, straight) == 1
    assert 0 < f_measure(dot, diagonal) < 1


def test_tolerance_grows_with_the_diagonal() -> None:
    square, moved = (rectangle(480, 854, 100 + d, 200, 220 + d, 330) for d in (0, 8))
    further = rectangle(480, 854, 109, 200, 229, 330)
    assert f_measure(square, moved) == 1  # ceil(0.008 * 979.6) = 8
    assert f_measure(square, further) < 1


def test_f_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(80):
        pred, truth = random_masks(rng)
        assert {tuple(p) for p in np.argwhere(boundary_map(pred))} == brute_boundary(pred)
        assert f_measure(pred, truth) == brute_f(pred, truth)


@given(PAIRS)
@settings(max_examples=150, deadline=None)
def test_properties(pair: tuple[np.ndarray, np.ndarray]) -> None:
    pred, truth = pair
    assert f_measure(pred, truth) == brute_f(pred, truth)
    assert f_measure(pred, truth) == pytest.approx(f_measure(truth, pred), abs=1e-12)
    assert j_measure(pred, truth) == j_measure(truth, pred)
    assert j_measure(pred, pred) == f_measure(pred, pred) == 1
    assert 0 <= j_measure(pred, truth) <= 1 and 0 <= f_measure(pred, truth) <= 1


def test_frames_of_a_clip_are_scored_one_by_one() -> None:
    rng = np.random.default_rng(1)
    pred, truth = rng.random((2, 5, 24, 37)) < 0.3
    pred[1] = truth[1] = False
    truth[2] = False
    j, f = region_similarity(pred, truth), contour_accuracy(pred, truth)
    assert j.dtype == f.dtype == np.float64 and j.shape == f.shape == (5,)
    assert j.tolist() == [brute_j(p, t) for p, t in zip(pred, truth, strict=True)]
    assert f.tolist() == [brute_f(p, t) for p, t in zip(pred, truth, strict=True)]
    assert (j[1], f[1], j[2], f[2]) == (1, 1, 0, 0)


# --- adversarial masks against distances ------------------------------------------------------------------------------


def distance_f(pred: np.ndarray, truth: np.ndarray) -> float:
    """The definition by exact Euclidean distances: a boundary pixel matches when the other boundary is near enough."""
    radius = math.ceil(0.008 * np.linalg.norm(pred.shape))
    boundaries = []
    for mask in (pred, truth):
        # Beyond the last row and column stand copies of them; the last pixel has no neighbour left to differ from.
        right, below = np.pad(mask, ((0, 0), (0, 1)), "edge")[:, 1:], np.pad(mask, ((0, 1), (0, 0)), "edge")[1:]
        corner = np.pad(mask, ((0, 1), (0, 1)), "edge")[1:, 1:]
        boundaries.append((mask != right) | (mask != below) | (mask != corner))
    sums = [boundary.sum() for boundary in boundaries]
    if not all(sums):
        return float(not any(sums))
    near = [ndimage.distance_transform_edt(~other) <= radius + 1e-9 for other in boundaries[::-1]]
    precision, recall = (
        (boundary & close).sum() / total for boundary, close, total in zip(boundaries, near, sums, strict=True)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def adversarial_masks(height: int, width: int) -> dict[str, np.ndarray]:
    y, x = np.mgrid[:height, :width]
    masks = {name: np.zeros((height, width), bool) for name in ("empty", "pixel", "corner", "row", "column", "frame")}
    masks["pixel"][height // 2, width // 3] = masks["corner"][-1, -1] = True
    masks["row"][height // 3] = masks["column"][:, -1] = True
    masks["frame"][[0, -1]] = masks["frame"][:, [0, -1]] = True
    return masks | {
        "full": np.ones((height, width), bool),
        "board": (x + y) % 2 == 0,
        "diagonal": abs(y * width - x * height) < width,
        "disk": (y - height * 0.6) ** 2 + (x - width * 0.4) ** 2 < (0.2 * min(height, width)) ** 2,
        "left": x < width * 0.5,
        "noise": np.random.default_rng(height).random((height, width)) < 0.02,
    }


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 90), (61, 1), (120, 213), (300, 64)], ids=lambda size: "x".join(map(str, size))
)
def test_adversarial_masks(size) -> None:
    """Every mask against every other: empty, full, one pixel, thin lines, borders, chequerboard, noise."""
    masks = list(adversarial_masks(*size).values())
    pairs = [(p, t) for p in masks for t in masks]
    pred, truth = np.stack([p for p, _ in pairs]), np.stack([t for _, t in pairs])
    expected = [(brute_j(p, t), distance_f(p, t)) for p, t in pairs]
    np.testing.assert_allclose(region_similarity(pred, truth), [j for j, _ in expected], rtol=0, atol=1e-9)
    np.testing.assert_allclose(contour_accuracy(pred, truth), [f for _, f in expected], rtol=0, atol=1e-9)


def test_4k() -> None:
    masks = adversarial_masks(2160, 3840)
    pred, truth = masks["disk"] | masks["row"], np.roll(masks["disk"], (30, -44), (0, 1)) ^ masks["pixel"]
    assert region_similarity(pred[None], truth[None])[0] == pytest.approx(brute_j(pred, truth), abs=1e-12)
    assert 0 < distance_f(pred, truth) < 1
    assert contour_accuracy(pred[None], truth[None])[0] == pytest.approx(distance_f(pred, truth), abs=1e-9)


def test_wrong_masks_are_refused() -> None:
    for measure in (region_similarity, contour_accuracy):
        with pytest.raises(ValueError, match="different shapes"):
            measure(np.zeros((2, 4, 4), bool), np.zeros((3, 4, 4), bool))
        with pytest.raises(ValueError, match="T, H, W"):
            measure(np.zeros((4, 4), bool), np.zeros((4, 4), bool))
        with pytest.raises(TypeError, match="bool"):
            measure(np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8))
