"""What a sidecar keeps stays within its limits, while clips are still coming too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from revseg_jax.errors import InputError
from revseg_jax.tracker.clips import Clip, ClipNotHeld, ClipStore, ClipWriter, Full, Limits
from revseg_jax.tracker.tracker_pb2 import RGB
from revseg_jax.tracker.wire import encode_masks, truth_hash

FRAME = 8 * 8 * 3  # bytes


def clip_of(store: ClipStore, value: int, frames: int = 1) -> Clip:
    with store.room() as (take, put):
        return put(written(store, take, value, frames))


def written(store: ClipStore, take: Callable[[int], None], value: int, frames: int) -> Clip:
    writer = ClipWriter(8, 8, RGB, 8, 8, store.limits, take)
    for _ in range(frames):
        writer.add(bytes([value]) * FRAME, last=True)
    return writer.close("")


def test_clips_that_are_coming_count():
    """Held ones go for them, and those that come together may not be more than all."""
    store = ClipStore(Limits(clip_bytes=4 * FRAME))
    for value in range(3):
        clip_of(store, value)
    with store.room() as (take, _), store.room() as (other, _):
        take(2 * FRAME)
        assert len(store) == 2
        other(2 * FRAME)
        assert len(store) == 0
        with pytest.raises(Full):
            take(1)
    assert clip_of(store, 5, frames=4).bytes == 4 * FRAME and len(store) == 1
    with pytest.raises(InputError, match="clip: more than 768 bytes"):
        clip_of(store, 6, frames=5)


def test_a_clip_just_put_stays_though_others_are_coming():
    """Its room is not theirs before it is held."""
    store = ClipStore(Limits(clip_bytes=4 * FRAME))
    old = clip_of(store, 0)
    with store.room() as (other, _):
        other(FRAME)
        with store.room() as (take, put):
            clip = written(store, take, 1, frames=3)
            with pytest.raises(Full):
                other(FRAME)
            assert store.get(put(clip).clip_id) is clip and len(store) == 1
        with pytest.raises(ClipNotHeld):
            store.get(old.clip_id)
        other(3 * FRAME)  # held clips do go for those that come
        assert len(store) == 0


def test_a_clip_that_failed_to_come_leaves_its_room():
    store = ClipStore(Limits(clip_bytes=2 * FRAME))
    for _ in range(3):
        with pytest.raises(RuntimeError), store.room() as (take, _):
            take(2 * FRAME)
            raise RuntimeError
    clip_of(store, 1, frames=2)


def test_truths_of_one_clip_stay_within_the_limit_of_all():
    masks = np.random.default_rng(0).random((9, 1, 8, 8)) < 0.5
    counts = [encode_masks(mask) for mask in masks]
    most = sum(len(part[0]) for part in counts[-4:])
    store = ClipStore(Limits(all_truth_bytes=most))
    other, clip = clip_of(store, 1), clip_of(store, 2)
    for part in counts:
        store.add_truth(clip, truth_hash(part), part)
    assert list(clip.truths) == [truth_hash(part) for part in counts[-len(clip.truths) :]]
    assert clip.truth_bytes == sum(len(part[0]) for part in counts[-len(clip.truths) :]) <= most
    assert store.get(other.clip_id) is other
