"""Clips through real array_record files and the Grain pipeline: nothing lost, nothing repeated, exact resume."""

from __future__ import annotations

import filecmp
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revseg_jax.config import ChainConfig
from revseg_jax.data import example as example_module
from revseg_jax.data import pipeline, prepared, records, synthetic_builder
from revseg_jax.data.clip import Clip, boxes_and_areas, decode_frame, decode_mask, encode_mask
from revseg_jax.data.example import make_example, stack
from revseg_jax.data.filtered import write_decisions
from revseg_jax.data.frames import decode_square, encode_frame, resize_square
from revseg_jax.data.pipeline import training_steps
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.records import VideoExpression, clip_of, hash_record, make_record
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic import render
from revseg_jax.data.synthetic_builder import REVERSED, prepare_synthetic
from revseg_jax.data.workers import ExampleWorkers
from revseg_jax.errors import InputError, RunFailure

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
CHAIN = ChainConfig(frames=8, frame_size=28, keyframe_size=56)
TRAIN, TEST, SEED = 7, 2, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "easy"
    prepare_synthetic(path, "easy", TRAIN, TEST, SEED, progress=False)
    return path


@pytest.fixture(scope="module")
def source(folder) -> ClipSource:
    return ClipSource([folder], "train")


def scene_of(clip: Clip):
    split, number = clip.video_id.split("-")
    return render((SEED << 32) + int(number), "easy", split)


# --- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(source):
    """What comes out of the files is what was rendered: queries, times, frames but for JPEG, masks exactly."""
    pairs = 0
    for clip in (source[i] for i in range(len(source))):
        scene = scene_of(clip)
        expression = scene.expressions[int(clip.expression_id)]
        assert (clip.query, clip.kind) == (expression.query, expression.kind)
        assert (clip.fps, clip.height, clip.width) == (scene.fps, 128, 128)
        assert len(clip.frames) == len(clip.masks) == len(scene.frames)
        truth = scene.masks[:, expression.target]
        for t in (0, len(scene.frames) - 1):
            assert np.abs(decode_frame(clip.frames[t]).astype(int) - scene.frames[t]).mean() < 2
        for t, rle in enumerate(clip.masks):
            np.testing.assert_array_equal(decode_mask(rle, 128, 128), truth[t])
            assert (rle is None) == (not truth[t].any())
        boxes, _ = boxes_and_areas(clip.masks, 128, 128)
        np.testing.assert_array_equal(boxes, scene.boxes[:, expression.target])
        pairs += 1
    assert pairs == read_prepared(source.folders[0])["summary"]["train"]["expressions"] > 3 * TRAIN


def test_source_order_and_bounds(folder, source):
    seen = [(source[i].video_id, int(source[i].expression_id)) for i in range(len(source))]
    assert [(video, int(expression)) for video, expression in source.ids()] == seen
    assert seen == sorted(seen) and len({video for video, _ in seen}) == TRAIN
    backwards = [(source[i].video_id, int(source[i].expression_id)) for i in reversed(range(len(source)))]
    assert backwards == seen[::-1]
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
    twice = ClipSource([folder, folder], "train")
    assert len(twice) == 2 * len(source) and twice[len(source) + 3] == source[3]
    assert pickle.loads(pickle.dumps(source))[4] == source[4]


def test_splits_are_disjoint(folder, source):
    test = ClipSource([folder], "test")
    assert test[0].video_id.startswith("test-") and source[0].video_id.startswith("train-")
    assert source[0].frames[0] != test[0].frames[0]


def test_no_tensorflow(source):
    assert source[0] and "tensorflow" not in sys.modules


def test_preparing_again_reuses_or_refuses(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_synthetic(folder, "easy", TRAIN, TEST, SEED, progress=False) == read_prepared(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="other settings"):
        prepare_synthetic(folder, "easy", TRAIN, TEST, SEED + 1, progress=False)


def test_fingerprint_is_of_the_content(tmp_path, folder):
    same, other = (
        prepare_synthetic(tmp_path / str(seed), "easy", TRAIN, TEST, seed, progress=False)["fingerprint"]
        for seed in (SEED, SEED + 1)
    )
    assert same == read_prepared(folder)["fingerprint"] != other
    assert ClipSource([tmp_path / str(SEED)], "train").fingerprints == [same]


def test_any_number_of_processes_draws_the_same_scenes(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(synthetic_builder, "DRAWN_AT_ONCE", 2)
    prepare_synthetic(tmp_path / "two", "easy", TRAIN, TEST, SEED, progress=False, workers=2)
    assert read_prepared(tmp_path / "two") == read_prepared(folder)
    files = [path.name for path in folder.glob("*.array_record-*")]
    assert len(files) == 3
    assert filecmp.cmpfiles(folder, tmp_path / "two", files, shallow=False) == (files, [], [])


def test_a_full_disk_leaves_no_folder_and_the_next_time_finishes(tmp_path, monkeypatch, folder):
    calls = []

    def full_disk(frame):
        calls.append(1)
        if len(calls) > 15:
            raise OSError(28, "No space left on device")
        return encode_frame(frame)

    monkeypatch.setattr(synthetic_builder, "encode_frame", full_disk)
    with pytest.raises(RunFailure, match="No space left") as caught:
        prepare_synthetic(tmp_path / "data", "easy", TRAIN, TEST, SEED, progress=False)
    assert "\n" not in str(caught.value) and str(tmp_path / "data") in str(caught.value)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert prepare_synthetic(tmp_path / "data", "easy", TRAIN, TEST, SEED, progress=False) == read_prepared(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="cannot write the dataset"):
        prepare_synthetic(tmp_path / "file" / "data", "easy", 1, 0, progress=False)


@pytest.mark.parametrize("arguments", [("simple", 1, 1, 0), ("easy", 0, 0, 0), ("easy", -1, 2, 0), ("easy", 1, 1, -3)])
def test_bad_settings(tmp_path, arguments):
    with pytest.raises(InputError):
        prepare_synthetic(tmp_path / "data", *arguments, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(tmp_path, folder):
    with pytest.raises(InputError, match="no dataset folders"):
        ClipSource([], "train")
    with pytest.raises(InputError, match="not a prepared dataset"):
        ClipSource([tmp_path], "train")
    with pytest.raises(InputError, match="no split 'val', only train, test"):
        ClipSource([folder], "val")
    (tmp_path / prepared.MARKER).write_text('{"format": 0}')
    with pytest.raises(InputError, match="another format"):
        ClipSource([tmp_path], "train")
    (tmp_path / prepared.MARKER).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        ClipSource([tmp_path], "train")
    (tmp_path / prepared.MARKER).write_text((folder / prepared.MARKER).read_text())
    with pytest.raises(InputError, match="array_record"):
        _ = ClipSource([tmp_path], "train")[0]


def some_record(**changes):
    masks = [encode_mask(np.eye(4, dtype=bool)), None]
    arguments = {
        "video_id": "v",
        "fps": 2.5,
        "height": 4,
        "width": 4,
        "frames": [b"a", b"b"],
        "frame_names": ["00000", "00005"],
        "objects": {"7": masks, "9": masks[::-1]},
        "expressions": [VideoExpression("0", "both", "x", (0, 1)), VideoExpression("1", "second", "x", (1,))],
    }
    return make_record(**(arguments | changes))


def test_records_share_objects_between_expressions():
    both, second = clip_of(some_record(), 0), clip_of(some_record(), 1)
    assert [rle is not None for rle in both.masks] == [True, True]
    assert [rle is not None for rle in second.masks] == [False, True]
    assert (second.query, second.expression_id, second.seconds) == ("second", "1", 0.8)
    assert both.frame_names == ("00000", "00005")


def test_bad_records():
    with pytest.raises(ValueError, match="1 masks for 2 frames"):
        some_record(objects={"7": [None]}, expressions=[])
    with pytest.raises(ValueError, match="1 names for 2 frames"):
        some_record(frame_names=["00000"])
    with pytest.raises(ValueError, match="not there"):
        some_record(expressions=[VideoExpression("0", "q", "x", (2,))])


def test_every_field_counts_in_the_hash():
    def hash_of(record):
        digest = hashlib.sha256()
        hash_record(digest, record)
        return digest.hexdigest()

    base = some_record()
    assert hash_of(base) == hash_of(dict(reversed(base.items())))
    changed = [{**base, key: value[:-1] if hasattr(value, "__len__") else value + 1} for key, value in base.items()]
    assert len({hash_of(record) for record in [base, *changed]}) == len(base) + 1
    # Moving bytes from one item to the next is a change too.
    assert hash_of({**base, "frames": [b"ab", b""]}) != hash_of({**base, "frames": [b"a", b"b"]})


# --- examples and batches --------------------------------------------------------------------------------------------


def test_example(source):
    clip = next(source[i] for i in range(len(source)) if len(source[i].frames) > 8)
    example, scene = make_example(clip, 11, CHAIN), scene_of(clip)
    sampled = sample_frames(len(clip.frames), 8)
    truth = scene.boxes[sampled, scene.expressions[int(clip.expression_id)].target]
    assert example.index == 11 and example.frame_count == 8 and example.sampled.tolist() == sampled.tolist()
    assert example.frames.shape == (8, 28, 28, 3) and example.frames.dtype == np.uint8
    np.testing.assert_array_equal(example.frames[3], resize_square(decode_frame(clip.frames[sampled[3]]), 28))
    np.testing.assert_array_equal(example.boxes, truth)
    np.testing.assert_array_equal(example.areas, (truth[:, 2] - truth[:, 0]) * (truth[:, 3] - truth[:, 1]))
    assert example.jpegs == tuple(clip.frames[t] for t in sampled)
    assert example.masks == tuple(clip.masks[t] for t in sampled)
    assert example.size.tolist() == [128, 128] and example.seconds == len(clip.frames) / 4.0


def test_short_clips_are_padded(source):
    clip = source[0]
    short = Clip(
        **{f.name: getattr(clip, f.name) for f in fields(Clip)} | {"frames": clip.frames[:3], "masks": clip.masks[:3]}
    )
    example = make_example(short, 0, CHAIN)
    assert example.frame_count == 3 and example.sampled.tolist() == [0, 1, 2] + [-1] * 5
    assert (example.frames[3:] == example.frames[2]).all()
    assert (example.boxes[3:] == 0).all() and (example.areas[3:] == 0).all()
    assert len(example.jpegs) == len(example.masks) == 3
    batch = stack([example, make_example(clip, 1, CHAIN)])
    assert batch.frames.shape == (2, 8, 28, 28, 3) and batch.frame_count.tolist() == [3, 8] and len(batch) == 2
    assert batch.query == (clip.query, clip.query) and batch.areas.dtype == np.float32


def test_a_clip_without_frames_is_refused(source):
    empty = Clip("v", "0", "q", "x", 4.0, 8, 8, (), (), ())
    with pytest.raises(InputError, match="no frames"):
        make_example(empty, 0, CHAIN)


def test_only_sampled_frames_are_decoded(source, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        example_module, "decode_square", lambda jpeg, size: decoded.append(jpeg) or decode_square(jpeg, size)
    )
    clip = max((source[i] for i in range(len(source))), key=lambda clip: len(clip.frames))
    assert len(clip.frames) > 8
    example = make_example(clip, 0, CHAIN)
    assert decoded == list(example.jpegs) and len(decoded) == 8


def ids(batch):
    return list(zip(batch.video_id, batch.expression_id, strict=True))


def take(steps, count):
    return [next(steps) for _ in range(count)]


def equal(a, b) -> bool:
    """Whether two batches agree in every field."""
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def test_every_epoch_shows_every_pair_once(source):
    everything = [(source[i].video_id, source[i].expression_id) for i in range(len(source))]
    size = len(source)
    batches = take(training_steps(source, CHAIN, 3, seed=1), -(-2 * size // 3))
    shown = [pair for batch in batches for pair in ids(batch)]
    assert sorted(shown[:size]) == sorted(shown[size : 2 * size]) == sorted(everything)
    assert shown[:size] != shown[size : 2 * size] and shown[:size] != everything
    assert np.concatenate([batch.index for batch in batches]).tolist() == list(range(3 * len(batches)))
    # Shuffled over all videos: neighbours rarely share one.
    assert np.mean([a[0] == b[0] for a, b in zip(shown, shown[1:], strict=False)]) < 0.5


def test_seeds(source):
    first, again, other = (take(training_steps(source, CHAIN, 4, seed=seed), 2) for seed in (1, 1, 2))
    assert all(map(equal, first, again))
    assert ids(first[0]) != ids(other[0])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_step(source, processes):
    """Their parts, joined, are the batch of a single process: nothing missing, nothing twice, in the same order."""
    whole = take(training_steps(source, CHAIN, 6, seed=3), 4)
    parts = [take(training_steps(source, CHAIN, 6, 3, process, processes), 4) for process in range(processes)]
    for step, batch in enumerate(whole):
        assert [pair for part in parts for pair in ids(part[step])] == ids(batch)
        np.testing.assert_array_equal(np.concatenate([part[step].index for part in parts]), batch.index)
        np.testing.assert_array_equal(np.concatenate([part[step].frames for part in parts]), batch.frames)


def test_uneven_processes_are_refused(source):
    with pytest.raises(InputError, match="multiple of the 4 processes"):
        training_steps(source, CHAIN, 6, 0, 0, 4)


@settings(max_examples=5, deadline=None)
@given(done=st.integers(0, 12), ahead=st.integers(0, 3))
def test_exact_resume(source, done, ahead):
    """A state taken after `done` steps resumes there, whatever was read since, through JSON and in a new iterator."""
    iterator = training_steps(source, CHAIN, 5, seed=9)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(ahead + 1)]
    resumed = training_steps(source, CHAIN, 5, seed=9)
    if ahead:
        next(resumed)
    resumed.set_state(state)
    assert all(equal(batch, next(resumed)) for batch in expected)
    assert expected[0].index[0] == 5 * done


def test_a_state_resumes_with_another_number_of_processes(source):
    whole = training_steps(source, CHAIN, 6, seed=3)
    taken = take(whole, 2)
    part = training_steps(source, CHAIN, 6, 3, process_index=1, process_count=3)
    part.set_state(whole.get_state())
    following = next(whole)
    assert ids(next(part)) == ids(following)[2:4] and ids(following) != ids(taken[1])
    back = training_steps(source, CHAIN, 6, seed=3)
    back.set_state(part.get_state())
    assert equal(next(back), next(whole))


def test_worker_processes_change_nothing(source):
    """Nor does it matter in which of the two ways a run is resumed."""
    plain = take(training_steps(source, CHAIN, 4, seed=2), 6)
    workers = training_steps(source, CHAIN, 4, seed=2, workers=2)
    assert all(equal(next(workers), batch) for batch in plain[:2])
    alone = training_steps(source, CHAIN, 4, seed=2)
    alone.set_state(workers.get_state())
    assert all(equal(next(alone), batch) for batch in plain[2:4])
    workers.set_state(alone.get_state())
    assert all(equal(next(workers), batch) for batch in plain[4:])


def worker_ids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


class HalfAnAnswer:
    """A source whose reader is killed in the middle of its answer."""

    def __getitem__(self, pair: int):
        def send(connection, answer):
            os.write(connection.fileno(), struct.pack("!i", 1000) + b"the first of 1000 bytes")
            os.kill(os.getpid(), signal.SIGKILL)

        multiprocessing.connection.Connection.send = send  # in the worker


def test_a_worker_killed_in_the_middle_of_an_answer_is_not_waited_for():
    workers = ExampleWorkers(HalfAnAnswer(), CHAIN, 2)
    for _ in range(3):  # each of the two, and one that is gone already
        with pytest.raises(RunFailure, match="one of the 2 processes that read clips was killed"):
            workers(0, 0)


def test_a_killed_worker_is_one_line(source):
    before = worker_ids()
    steps = training_steps(source, CHAIN, 4, seed=2, workers=1)
    next(steps)
    (worker,) = worker_ids() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RunFailure, match="processes that read clips was killed") as caught:
        take(steps, 20)
    assert "\n" not in str(caught.value)


def test_damaged_clips_are_named_by_workers_too(tmp_path, folder):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(b"" if ".array_record" in path.name else path.read_bytes())
    with pytest.raises(InputError, match="record [0-9]+ of 'train' cannot be read"):
        next(training_steps(ClipSource([copy], "train"), CHAIN, 4, seed=2, workers=1))


def test_workers_import_no_framework(folder):
    """What a worker runs, from its first import to an example: many of them must fit beside a trainer."""
    code = f"""
import sys
from revseg_jax.config import ChainConfig
from revseg_jax.data import workers
from revseg_jax.data.source import ClipSource
source, chain = ClipSource([{str(folder)!r}], "train"), ChainConfig(frames=2, frame_size=28)
assert workers._made(source, chain, 3, 8).index == 8
assert not {{"jax", "torch", "tensorflow", "grain", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reversed_split_is_the_test_split_backwards(folder):
    scenes = {}
    source = ClipSource([folder], REVERSED)
    for clip in (source[i] for i in range(len(source))):
        scene = render((SEED << 32) + int(clip.video_id.split("-")[-1]), "easy", "test").reversed()
        expression = scene.expressions[int(clip.expression_id)]
        assert clip.query == expression.query
        np.testing.assert_array_equal(decode_mask(clip.masks[0], 128, 128), scene.masks[0, expression.target])
        scenes[clip.video_id] = scene
    assert len(scenes) == TEST


def test_records_module_imports_tfds_lazily():
    """Reading clips of real videos must not pay for TFDS at import."""
    assert "tensorflow_datasets" not in vars(records)


# --- mixtures and dropped videos -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "other"
    prepare_synthetic(path, "easy", 2, 0, SEED + 1, progress=False)
    return path


def test_mixtures_take_turns_by_weight(folder, other):
    """A quarter of what is shown is of the small folder, each folder has whole epochs of its own, and the processes
    still share every step."""
    source = ClipSource([folder, other], "train", weights=[3, 1])
    large, small = source.parts()
    assert (large.start, large.stop, small.stop) == (0, len(ClipSource([folder], "train")), len(source))
    order = [int(i) for i in pipeline._order(source, seed=4)[: 4 * len(small) * 2]]
    shown = [i for i in order if i in small]
    assert len(shown) == 2 * len(small)
    assert sorted(shown[: len(small)]) == sorted(shown[len(small) :]) == list(small)
    assert shown[: len(small)] != shown[len(small) :]
    assert all(abs(sum(i in small for i in order[:n]) - n / 4) <= 1 for n in range(len(order)))
    whole = take(training_steps(source, CHAIN, 4, seed=4), 3)
    parts = [take(training_steps(source, CHAIN, 4, 4, process, 2), 3) for process in range(2)]
    for step, batch in enumerate(whole):
        assert ids(batch) == [pair for part in parts for pair in ids(part[step])]
    iterator = training_steps(source, CHAIN, 4, seed=4)
    next(iterator)
    resumed = training_steps(source, CHAIN, 4, seed=4)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert equal(next(resumed), whole[1])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -2], [1, 1, 1]])
def test_bad_weights(folder, other, weights):
    with pytest.raises(InputError, match="data.weights"):
        ClipSource([folder, other], "train", weights)


def test_dropped_videos_are_left_out(tmp_path, folder, source):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    gone = source.ids()[0][0]
    write_decisions(copy, {"split": "train", "dropped": [gone]})
    left = ClipSource([copy], "train")
    assert left.ids() == [pair for pair in source.ids() if pair[0] != gone]
    assert [(left[i].video_id, left[i].expression_id) for i in range(len(left))] == left.ids()
    assert left.fingerprints != source.fingerprints
    assert ClipSource([copy], "test").ids() == ClipSource([folder], "test").ids()
    every = ClipSource([copy], "train", with_dropped=True)
    assert every.ids() == source.ids() and every.fingerprints == source.fingerprints
    (copy / "filter.json").write_text("{")
    with pytest.raises(InputError, match="filter.json cannot be read"):
        ClipSource([copy], "train")
