"""The synthetic benchmark, checked from its pixels and masks rather than from the tracks that made them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import ndimage

from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic import COLOURS, DIFFICULTIES, HELD_OUT, SHAPES, VERSION, render

SEEDS = range(360)
PINNED = {
    ("easy", "train"): "913bc0064d9dfa78",
    ("easy", "test"): "689b8434d0ccb655",
    ("medium", "train"): "f729941f21ce7b91",
    ("medium", "test"): "16664bc49ab70923",
    ("hard", "train"): "c65ee4bf63590216",
    ("hard", "test"): "2f8bfaff20201a34",
}


class Measured:
    """What a scene's masks say: areas, boxes, centroids. The pixels, a gigabyte for all scenes, are not kept."""

    def __init__(self, scene):
        masks = scene.masks
        self.objects, self.expressions = scene.objects, scene.expressions
        columns, rows = masks.sum(2).astype(float), masks.sum(3).astype(float)
        self.area = rows.sum(-1)  # [T, K]
        moments = np.stack([columns @ np.arange(columns.shape[-1]), rows @ np.arange(rows.shape[-1])], -1)
        self.centroid = moments / np.maximum(self.area, 1)[..., None]  # [T, K, 2], x and y
        self.boxes = scene.boxes
        size = scene.difficulty.size
        # Centroids are to be trusted where nothing is cut off: not at the border, by the wall or by an object in front.
        inner = (self.boxes[..., :2] >= 1).all(-1) & (self.boxes[..., 2:] <= size - 1).all(-1) & (self.area > 0)
        apart = np.ones_like(inner)
        for k in range(masks.shape[1]):
            for other in range(k + 1, masks.shape[1]):  # those in front of it
                a, b = self.boxes[:, k], self.boxes[:, other]
                touch = (a[:, :2] <= b[:, 2:]).all(-1) & (b[:, :2] <= a[:, 2:]).all(-1)
                apart[:, k] &= ~(touch & (self.area[:, other] > 0))
        self.whole = inner & apart
        self.wall = scene.wall
        band = slice(scene.wall.start, scene.wall.stop) if scene.wall else slice(0)
        horizontal = scene.wall and scene.wall.horizontal
        self.seen_on_wall = bool((masks[:, :, band] if horizontal else masks[..., band]).any())
        sampled = sample_frames(len(masks), 8)
        self.box_areas = np.prod(self.boxes[sampled, :, 2:] - self.boxes[sampled, :, :2], -1)  # [8, K]

    def asked(self, template):
        return [e for e in self.expressions if e.template == template]

    def trusted(self, k):
        """Whether nearly all that is ever seen of object k is seen whole."""
        seen = self.area[:, k] > 0
        return self.wall is None and self.whole[:, k].sum() >= max(0.7 * seen.sum(), 4)

    def speeds(self):
        """[K] mean centroid speeds over neighbouring frames that show the whole object; nan if not to be trusted."""
        both = self.whole[1:] & self.whole[:-1]
        steps = np.linalg.norm(np.diff(self.centroid, axis=0), axis=-1)
        mean = (steps * both).sum(0) / np.maximum(both.sum(0), 1)
        return np.where([self.trusted(k) for k in range(len(self.objects))], mean, np.nan)


@pytest.fixture(scope="module")
def scenes():
    return [Measured(render(seed, "easy")) for seed in SEEDS]


def digest(scene) -> str:
    content = hashlib.sha256(scene.frames.tobytes() + np.packbits(scene.masks).tobytes())
    content.update(repr([(e.query, e.target) for e in scene.expressions]).encode())
    return content.hexdigest()[:16]


def test_content_is_pinned_to_the_version():
    """Anything that changes pixels, masks or queries must raise VERSION (and these hashes)."""
    assert VERSION == 1
    found = {(name, split): digest(render(7, name, split)) for name in DIFFICULTIES for split in ("train", "test")}
    assert found == PINNED


def test_rendering_is_a_pure_function_of_its_arguments():
    first = digest(render(3, "medium"))
    assert digest(render(4, "medium")) != first != digest(render(3, "medium", "test"))
    assert digest(render(3, "medium")) == first
    assert digest(render(3, DIFFICULTIES["medium"])) == first


@pytest.mark.parametrize("frames", [1, 2, 5, 40])
def test_any_length(frames):
    scene = render(2, "hard", frames=frames)
    assert scene.frames.shape == (frames, 192, 192, 3) and scene.frames.dtype == np.uint8
    assert scene.masks.shape == (frames, len(scene.objects), 192, 192) and scene.masks.dtype == bool


@pytest.mark.parametrize(
    "arguments",
    [(0, "simple"), (0, "easy", "validation"), (0, "easy", "train", 0)],
    ids=["difficulty", "split", "frames"],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        render(*arguments)


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_knobs_are_respected(name):
    difficulty = DIFFICULTIES[name]
    for seed in range(6):
        scene = render(seed, name)
        assert difficulty.frames[0] <= len(scene.frames) <= difficulty.frames[1]
        assert difficulty.objects[0] <= len(scene.objects) <= difficulty.objects[1]
        looks = [(item.colour, item.shape) for item in scene.objects]
        assert len(set(looks)) == len(looks)
        if difficulty.distinct_colours:
            assert len({colour for colour, _ in looks}) == len(looks)


def test_held_out_looks():
    """Train never shows a held-out pair; every test scene does, and asks about them too."""
    targets = Counter()
    for seed in range(20):
        for name in ("easy", "hard"):
            train, test = render(seed, name, frames=8), render(seed, name, "test", frames=8)
            assert not any((item.colour, item.shape) in HELD_OUT for item in train.objects)
            assert any((item.colour, item.shape) in HELD_OUT for item in test.objects)
            for expression in test.expressions:
                item = test.objects[expression.target]
                targets[(item.colour, item.shape) in HELD_OUT] += 1
    assert targets[True] > 0.25 * targets.total() and targets[False] > 0.25 * targets.total()
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


@pytest.mark.parametrize("seed", range(6))
def test_masks_agree_with_the_pixels(seed):
    """Easy backgrounds and walls are nearly grey and objects are not, so colour alone tells where objects are."""
    scene = render(seed, "easy")
    chroma = scene.frames.max(-1).astype(int) - scene.frames.min(-1)
    anything = scene.masks.any(1)
    # Half a pixel of soft edge lies outside the mask, up to two pixels of it at the tip of a star.
    near = ndimage.binary_dilation(anything, np.ones((1, 3, 3)), iterations=2)
    assert (chroma[~near] < 40).all()
    assert (chroma[anything] > 50).mean() > 0.97
    assert (scene.masks.sum(1) <= 1).all()
    for k, item in enumerate(scene.objects):
        mean = scene.frames[scene.masks[:, k]].mean(0) if scene.masks[:, k].any() else COLOURS[item.colour]
        nearest = min(COLOURS, key=lambda name: sum((mean - np.array(COLOURS[name])) ** 2))
        assert nearest == item.colour


def test_circle_masks_are_exact():
    """A circle in full view covers exactly the pixels whose centres are within its radius."""
    checked = 0
    for seed in range(40):
        scene = render(seed, "easy", frames=8)
        for k, item in enumerate(scene.objects):
            for t in range(8):
                (cx, cy), radius = scene.tracks.centres[t, k], scene.tracks.radii[t, k]
                y, x = np.mgrid[:128, :128] + 0.5
                disc = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
                others = [scene.tracks.radii[t, j] * 1.5 + radius for j in range(3)]
                clear = all(j == k or math.dist(scene.tracks.centres[t, j], (cx, cy)) > others[j] for j in range(3))
                if item.shape == "circle" and scene.wall is None and clear:
                    np.testing.assert_array_equal(scene.masks[t, k], disc)
                    checked += 1
    assert checked > 50


def test_boxes():
    scene = render(1, "hard")
    for t in range(len(scene.frames)):
        for k in range(len(scene.objects)):
            rows, columns = np.nonzero(scene.masks[t, k])
            expected = [0, 0, 0, 0]
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert scene.boxes[t, k].tolist() == expected


def test_reversal():
    opposite = {
        "enters_last": "leaves_first", "enters_first": "leaves_last", "grows": "shrinks", "moves_left": "moves_right",
        "moves_up": "moves_down", "fastest": "fastest", "never_moves": "never_moves",
        "hidden_largest": "hidden_largest", "sets_moving": "stops", "turns": "turns",
    }  # fmt: skip
    opposite |= {later: earlier for earlier, later in opposite.items()}
    for seed in range(25):
        scene = render(seed, "easy")
        back = scene.reversed()
        np.testing.assert_array_equal(back.frames, scene.frames[::-1])
        np.testing.assert_array_equal(back.masks, scene.masks[::-1])
        np.testing.assert_array_equal(render(seed, "easy", reverse=True).frames, back.frames)
        asked = {(e.template, e.target) for e in scene.expressions if e.template in opposite}
        asked_back = {(opposite[e.template], e.target) for e in back.expressions if e.template in opposite}
        # Frames are sampled by rounding half up, so what is visible in enough of them may differ by a frame.
        assert len(asked ^ asked_back) <= 1
        assert {e.query for e in back.reversed().expressions} == {e.query for e in scene.expressions}


# --- targets, computed again from the masks -------------------------------------------------------------------------


def test_every_kind_and_template_occurs(scenes):
    kinds = Counter(e.kind for s in scenes for e in s.expressions)
    assert min(kinds["referring"], kinds["motion"], kinds["reasoning"]) > 200
    templates = Counter(e.template for s in scenes for e in s.expressions)
    for name in ("fastest", "slowest_mover", "never_moves", "enters_last", "leaves_first", "bounces", "moves_left"):
        assert templates[name] > 10, name
    for name in ("turns", "sets_moving", "is_pushed", "stops", "hidden_alone", "hidden_largest", "moving_largest"):
        assert templates[name] > 5, name
    assert sum(bool(s.expressions) for s in scenes) > 0.97 * len(scenes)


def test_referring_expressions_are_true_of_one_object_only(scenes):
    for scene in scenes:
        for e in scene.expressions:
            if e.kind == "referring":
                colours = [colour for colour in COLOURS if colour in e.query]
                shapes = [shape for shape in SHAPES if shape in e.query]
                fits = [
                    k
                    for k, item in enumerate(scene.objects)
                    if (not colours or item.colour == colours[0]) and (not shapes or item.shape == shapes[0])
                ]
                assert (colours or shapes) and fits == [e.target]


def test_targets_are_visible(scenes):
    """In at least 3 of 8 uniformly sampled frames."""
    for scene in scenes:
        for e in scene.expressions:
            assert (scene.box_areas[:, e.target] > 0).sum() >= 3


def test_fastest_and_slowest_from_centroids(scenes):
    checked = Counter()
    for scene in scenes:
        speeds = scene.speeds()
        if np.isnan(speeds).any():
            continue
        for e in scene.asked("fastest"):
            # Part of the path is out of sight for the centroid, so a little of the margin of 1.5 may be lost.
            assert speeds[e.target] > 1.1 * np.delete(speeds, e.target).max()
            checked["fastest"] += 1
        for e in scene.asked("slowest_mover"):
            assert 1.1 * speeds[e.target] < np.delete(speeds, e.target).min()
            checked["slowest"] += 1
    assert checked["fastest"] > 15 and checked["slowest"] > 4


def test_never_moves_from_centroids(scenes):
    checked = 0
    for scene in scenes:
        for e in scene.asked("never_moves"):
            for k in range(3):
                if scene.trusted(k):
                    spread = np.ptp(scene.centroid[scene.whole[:, k], k], axis=0).max()
                    # A shape that grows over the pixel grid moves its centroid by up to a pixel.
                    assert spread < 1.5 if k == e.target else spread > 2
                    checked += 1
    assert checked > 50


def test_entering_and_leaving_from_masks(scenes):
    """Without a wall an object that is hidden at first can only have been outside (or behind another: rare)."""
    checked = Counter()
    for scene in scenes:
        if scene.wall is not None:
            continue
        seen = scene.area > 0
        first, last = seen.argmax(0), len(seen) - 1 - seen[::-1].argmax(0)
        for template, times in (("enters_last", first), ("leaves_first", -last)):
            for e in scene.asked(template):
                assert times[e.target] >= np.delete(times, e.target).max() + 2
                checked[template] += 1
    assert min(checked.values()) > 10 and len(checked) == 2


@pytest.mark.parametrize(
    ("template", "axis", "sign"),
    [("moves_left", 0, -1), ("moves_right", 0, 1), ("moves_up", 1, -1), ("moves_down", 1, 1)],
)
def test_directions_from_centroids(scenes, template, axis, sign):
    checked = 0
    for scene in scenes:
        for e in scene.asked(template):
            frames = np.flatnonzero(scene.area[:, e.target])[[0, -1]]
            if scene.trusted(e.target):
                moved = sign * (scene.centroid[frames[1], e.target] - scene.centroid[frames[0], e.target])
                assert moved[axis] > 0.15 * 128 and moved[axis] > abs(moved[1 - axis])
                checked += 1
    assert checked > 2


def test_growing_and_shrinking_from_areas(scenes):
    checked = 0
    for scene in scenes:
        for template, sign in (("grows", 1), ("shrinks", -1)):
            for e in scene.asked(template):
                if scene.wall is None and scene.whole[[0, -1], e.target].all():
                    assert sign * np.log(scene.area[-1, e.target] / scene.area[0, e.target]) > 0.6
                    checked += 1
    assert checked > 15


def test_collisions_from_centroids(scenes):
    """Where the mentioned object's path bends most, the target is close to it."""
    checked = 0
    for scene in scenes:
        for e in scene.asked("turns"):
            seen = (scene.area[:, [e.mentions, e.target]] > 200).all(1)
            if scene.wall is not None or not seen.all():
                continue
            path = ndimage.median_filter(scene.centroid[:, e.mentions], (1, 1))
            steps = np.diff(path, axis=0)
            bend = np.linalg.norm(np.diff(steps, axis=0), axis=1)
            turn = int(bend.argmax()) + 1
            u, v = steps[: turn - 1].mean(0) if turn > 1 else steps[0], steps[turn + 1 :].mean(0)
            if np.isnan(v).any() or min(np.linalg.norm(u), np.linalg.norm(v)) < 1:
                continue
            reach = np.sqrt(scene.area[turn] / math.pi)
            gap = math.dist(scene.centroid[turn, e.mentions], scene.centroid[turn, e.target])
            near = gap < 1.6 * (reach[e.mentions] + reach[e.target])
            assert near or not scene.trusted(e.mentions)
            checked += near
    assert checked > 20


def test_hidden_things_from_masks(scenes):
    """The wall is in front of everything, and the target is almost gone at some time."""
    checked = 0
    for scene in scenes:
        assert not scene.seen_on_wall
        for e in scene.asked("hidden_alone") + scene.asked("hidden_largest"):
            area = scene.area[:, e.target]
            assert scene.wall is not None and area.min() < 0.2 * area.max()
            checked += 1
    assert checked > 20


def test_largest_moving_thing_from_areas(scenes):
    checked = 0
    for scene in scenes:
        for e in scene.asked("moving_largest"):
            peak = np.where(scene.whole, scene.area, 0).max(0)
            # The target's largest moment must be in full view, and not at an end of its visit.
            seen = np.flatnonzero(scene.area[:, e.target])
            top = scene.area[:, e.target].argmax()
            if not scene.whole[top, e.target] or top - 1 not in seen or top + 1 not in seen:
                continue
            for k in range(3):
                moves = scene.whole[:, k].any() and np.ptp(scene.centroid[scene.whole[:, k], k], axis=0).max() > 3
                if k != e.target and moves:
                    assert peak[e.target] > peak[k]
                    checked += 1
    assert checked > 5


# --- no short cuts ---------------------------------------------------------------------------------------------------


def soft_temporal(areas):
    """The soft temporal reward of each of the frames, from the areas of boxes."""
    spread = areas.max() - areas.min()
    return np.where(areas > 0, (areas - areas.min()) / spread if spread else 1.0, 0.0)


def test_no_constant_frame_does_well(scenes):
    rewards = [
        (soft_temporal(s.box_areas[:, e.target]), s.box_areas[:, e.target]) for s in scenes for e in s.expressions
    ]
    constant = np.mean([reward for reward, _ in rewards], 0)
    random_visible = np.mean([reward[areas > 0].mean() for reward, areas in rewards])
    assert constant.max() < 0.48
    assert 0.38 < random_visible < 0.52
    absent = np.mean([(areas == 0).any() for _, areas in rewards])
    assert 0.15 < absent < 0.32


def test_time_is_symmetric(scenes):
    """A frame and its mirror image are the largest equally often; entering is as common as leaving."""
    peaks = np.array([s.box_areas[:, k].argmax() for s in scenes for k in range(3) if s.box_areas[:, k].any()])
    # Objects of a scene are drawn independently: 360 x 3 peaks with a standard deviation of 2.5 frames.
    assert abs(peaks.mean() - 3.5) < 4 * peaks.std() / math.sqrt(len(peaks))
    counts = Counter(e.template for s in scenes for e in s.expressions)
    for forward, backward in (("enters_last", "leaves_first"), ("grows", "shrinks"), ("sets_moving", "stops")):
        a, b = counts[forward], counts[backward]
        assert abs(a - b) < 3.5 * math.sqrt(a + b), (forward, a, b)


def test_text_alone_gives_nothing_away(scenes):
    """Guessing the target's look from the template, as learnt on half of the scenes, is no better than chance."""
    learnt: dict = defaultdict(Counter)
    half = len(scenes) // 2
    for scene in scenes[:half]:
        for e in scene.expressions:
            if e.kind != "referring":
                learnt[e.template].update([scene.objects[e.target].colour, scene.objects[e.target].shape])
    right, chances = [], []
    for scene in scenes[half:]:
        for e in scene.expressions:
            if e.kind == "referring":
                continue
            candidates = [k for k in range(3) if k != e.mentions]
            scores = [
                learnt[e.template][scene.objects[k].colour] + learnt[e.template][scene.objects[k].shape]
                for k in candidates
            ]
            best = [k for k, score in zip(candidates, scores, strict=True) if score == max(scores)]
            right.append((e.target in best) / len(best))
            chances.append(1 / len(candidates))
    assert len(right) > 300
    error = math.sqrt(np.mean(np.array(chances) * (1 - np.array(chances))) / len(right))
    assert np.mean(right) < np.mean(chances) + 3.5 * error


def test_a_constant_box_does_badly(scenes):
    """What a policy can do with blank frames: the best constant frame and box, chosen with hindsight."""
    boxes = [s.boxes[sample_frames(len(s.boxes), 8)][4, e.target] for s in scenes for e in s.expressions]
    boxes = np.array(boxes)
    best = 0.0
    for half_side in (12, 18, 26):
        for x in range(20, 128, 12):
            for y in range(20, 128, 12):
                low, high = np.array([x, y]) - half_side, np.array([x, y]) + half_side
                inter = np.clip(np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low), 0, None).prod(1)
                total = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (2 * half_side) ** 2 - inter
                best = max(best, float((inter / total > 0.5).mean()))
    assert best < 0.08
