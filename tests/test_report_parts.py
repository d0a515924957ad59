"""The parts of a report: curves, pictures, which chains are shown, and how an answer is cut."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from fake_run import rle_text
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from report_page import filled

from revseg_jax.data.frames import encode_frame
from revseg_jax.report.chains import chosen, overview, pieces
from revseg_jax.report.overlays import LONGEST_SIDE, outline_path, picture
from revseg_jax.report.plots import curves, smooth
from revseg_jax.report.results import temporal_verdict


def test_what_looks_equal_is_not_called_better():
    record = {"temporal": 0.5754, "best_constant_keyframe": 0.5753, "reversed_temporal": 0.58}
    verdict = "no better than the best constant keyframe. On the same clips played backwards they score 0.58, not past"
    assert verdict in temporal_verdict({}, record)


def test_a_curve_shows_its_numbers():
    """A ramp and its smooth line end where the axis says: heights in the drawing are proportional to the values."""
    steps = [{"step": step, "reward/mask": 0.2 + 0.005 * step} for step in range(1, 121)]
    rewards, _ = curves(steps, [{"step": 0, "jf": 10.0}, {"step": 60, "jf": float("nan")}, {"step": 120, "jf": 90.0}])
    mask, held_out = rewards
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0\)', mask.svg)
    assert len(drawn) == 2  # raw, then smooth
    zero, one = (float(re.search(rf'y="([\d.]+)"[^>]*>{label}<', mask.svg)[1]) for label in (r"0\.0", r"1\.0"))
    for path, rise in zip(drawn, (0.8 - 0.205, 0.788 - 0.217), strict=True):
        heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
        assert (heights[0] - heights[-1]) / (zero - one) == pytest.approx(rise, abs=0.01)
    assert mask.summary == "0.22 → 0.79"
    assert held_out.summary == "10 → 90"
    assert "nan" not in held_out.svg


def test_smoothing_is_light():
    assert smooth(np.full(30, 0.7)) == pytest.approx(np.full(30, 0.7))
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp)[20:-20], ramp[20:-20], atol=0.01)
    step = np.repeat([0.0, 1.0], 100)
    assert smooth(step)[80] < 0.01 and smooth(step)[120] > 0.99
    noise = np.random.default_rng(0).normal(size=200)
    assert smooth(noise).std() < 0.4 * noise.std()


@settings(deadline=None)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_outlines_filled_are_the_mask(mask):
    np.testing.assert_array_equal(filled(outline_path(mask), *mask.shape), mask)


def test_large_frames_become_small_pictures():
    frame = np.zeros((720, 1280, 3), np.uint8)
    mask = np.zeros((720, 1280), bool)
    mask[360:, 640:] = True  # the lower right quarter
    thumb = {"t": 3, "jpeg": base64.b64encode(encode_frame(frame)).decode(), "mask": rle_text(mask), "truth": None}
    small = picture(thumb)
    assert (small.t, small.width, small.height, small.truth) == (3, LONGEST_SIDE, 135, "")
    shape = filled(small.predicted, small.height, small.width)
    assert shape[68:, 120:].all() and not shape[:67].any() and not shape[:, :120].any()


def _pair(name: str, base: float, trained: float, pictures: bool = True) -> dict:
    return {
        label: {"video_id": name, "j": jf, "f": jf, "thumbs": [{}] if pictures else [], "failure": ""}
        for label, jf in (("base", base), ("trained", trained))
    }


def test_examples_are_the_best_the_typical_the_failing_and_the_worse():
    pairs = [
        _pair("gain 70", 0.2, 0.9),
        _pair("gain 90 without pictures", 0.0, 0.9, pictures=False),
        _pair("gain 80", 0.1, 0.9),
        *[_pair(f"gain 2{i}", 0.6, 0.8 + i / 100) for i in range(5)],
        _pair("fails", 0.1, 0.1),
        _pair("fails a bit", 0.3, 0.4),
        _pair("worse", 0.9, 0.6),
    ]
    names = [(why, next(iter(pair.values()))["video_id"]) for why, pair in chosen(pairs)]
    assert names == [
        ("Biggest improvement", "gain 80"), ("Biggest improvement", "gain 70"), ("Typical", "gain 22"),
        ("Typical", "gain 21"), ("Still failing", "fails"), ("Still failing", "fails a bit"), ("Got worse", "worse"),
    ]  # fmt: skip
    counts = overview(pairs)
    assert (counts.clips, counts.better, counts.worse) == (11, 9, 1)
    assert chosen([]) == []


def test_no_clip_is_shown_twice_and_none_called_failing_that_is_not():
    names = [(why, next(iter(pair.values()))["video_id"]) for why, pair in chosen([_pair("a", 0.6, 0.9)])]
    assert names == [("Biggest improvement", "a")]
    assert [why for why, _ in chosen([_pair("a", 0.7, 0.7), _pair("b", 0.9, 0.5)])] == ["Typical", "Got worse"]


@given(st.text(alphabet="<>/thinkasw er", max_size=60) | st.text(max_size=30))
def test_answers_are_cut_without_losing_a_letter(text):
    assert "".join(part for _, part in pieces(text)) == text


def test_pieces_of_an_answer():
    assert pieces("so <think>a < b</think>\n<answer>[1]</answer> end") == [
        ("plain", "so "), ("tag", "<think>"), ("think", "a < b"), ("tag", "</think>"), ("plain", "\n"),
        ("tag", "<answer>"), ("answer", "[1]"), ("tag", "</answer>"), ("plain", " end"),
    ]  # fmt: skip
