"""`revseg prepare` on small trees of the published layouts, on damaged ones, and killed in the middle."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import dataset_trees as trees
import numpy as np
import pytest
from child_processes import children, running, wait_for
from dataset_trees import HEIGHT, MEVIS_OBJECTS, WIDTH
from PIL import ExifTags, Image
from prepared_datasets import assert_masks, prepared_clips, union

from revseg_jax.cli import main
from revseg_jax.config import ChainConfig
from revseg_jax.data import writer
from revseg_jax.data.clip import decode_frame, decode_mask
from revseg_jax.data.datasets import ref_youtube_vos
from revseg_jax.data.datasets.masks import polygon_masks
from revseg_jax.data.pipeline import training_steps
from revseg_jax.data.prepare import VERSION, prepare
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.records import FOREGROUND, VOID
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError


def assert_frames(clip, folder: Path, names: list[str]) -> None:
    """The bytes of the files, untouched, in the order of their names."""
    assert clip.frame_names == tuple(names)
    assert list(clip.frames) == [(folder / f"{name}.jpg").read_bytes() for name in names]


def test_ref_youtube_vos(tmp_path):
    content, clips, source = prepared_clips("ref_youtube_vos", trees.ref_youtube_vos, tmp_path, "train")
    assert [clip.expression_id for clip in clips] == [str(n) for n in range(12)]  # not as texts: 0 1 10 11 2 ...
    assert [clip.query for clip in clips[:3]] == ["thing 0", "thing 1", "thing 2"]
    assert_frames(clips[0], tmp_path / "in/train/JPEGImages/0a1b", trees.YTVOS_NAMES)
    assert_masks(clips[1], union(trees.YTVOS_OBJECTS[1]))
    assert_masks(clips[10], union(trees.YTVOS_OBJECTS[2]))
    assert clips[0].fps == 6 and content["truth"] == {"train": True}
    summary = content["summary"]["train"]
    assert (summary["videos"], summary["expressions"], summary["frames"], summary["objects"]) == (1, 12, 4, 2)


def test_ref_youtube_vos_valid_without_a_list_of_test(tmp_path, monkeypatch):
    """Test's frames are not given away any more: a video without frames is one of them, if the others are as many as
    valid has. Else some of valid may be lacking, or some of test there."""

    def tree(root: Path, frames: bool = False) -> Path:
        trees.ref_youtube_vos(root)
        shutil.rmtree(root / "meta_expressions/test")
        if not frames:
            shutil.rmtree(root / "valid/JPEGImages/test")
        return root

    for name, with_test, videos in (("a", False, {"val"}), ("b", True, {"val", "test"})):
        content, clips, _ = prepared_clips("ref_youtube_vos", partial(tree, frames=with_test), tmp_path / name, "valid")
        assert {clip.video_id for clip in clips} == videos
        assert content["summary"]["valid"]["problems"] == {"split of another size": 1}
    with pytest.raises(InputError, match="the valid split has 1 videos, and the server scores 202"):
        prepared_clips("ref_youtube_vos", tree, tmp_path / "c", "valid", strict=True)
    monkeypatch.setattr(ref_youtube_vos, "VALID_VIDEOS", 1)
    content, clips, _ = prepared_clips("ref_youtube_vos", tree, tmp_path / "d", "valid", strict=True)
    assert {clip.video_id for clip in clips} == {"val"} and content["summary"]["valid"]["problems"] == {}


def test_ref_youtube_vos_valid_is_valid_without_test(tmp_path):
    content, clips, _ = prepared_clips("ref_youtube_vos", trees.ref_youtube_vos, tmp_path, "valid")
    assert [clip.video_id for clip in clips] == ["val"] and content["truth"] == {"valid": False}
    assert content["summary"]["valid"]["problems"] == {}


def test_ref_davis17(tmp_path):
    _, clips, source = prepared_clips("ref_davis17", trees.ref_davis17, tmp_path, "valid")
    assert [clip.query for clip in clips] == [f"object {n // 4} by {n % 4}" for n in range(8)]
    for n, clip in enumerate(clips):
        assert_masks(clip, union(trees.DAVIS_OBJECTS[n // 4 + 1]))
    video = source.video(0)
    assert decode_mask(video.objects[VOID][0], HEIGHT, WIDTH).tolist() == trees.box(60, 20, 6).tolist()
    assert list(video.objects) == ["1", "2", "3", VOID]
    for rle, mask in zip(video.objects["3"], trees.DAVIS_OBJECTS[3], strict=True):
        np.testing.assert_array_equal(decode_mask(rle, HEIGHT, WIDTH), mask)


def test_mevis(tmp_path):
    _, clips, source = prepared_clips("mevis", trees.mevis, tmp_path, "valid_u")
    assert_masks(clips[0], union(MEVIS_OBJECTS["4"], MEVIS_OBJECTS["17"]))
    assert_masks(clips[1], union(MEVIS_OBJECTS["23"]))
    video = source.video(0)
    assert list(video.objects) == ["4", "17", "23"] and video.objects["17"][1] is None
    assert [e.objects for e in video.expressions] == [(0, 1), (2,)]


@pytest.mark.parametrize(
    "names",
    [["0", "1", "10", "2"], ["b", "a", "d", "c"], ["00003", "00002", "00001", "00000"]],
)
def test_masks_follow_their_frames(tmp_path, names):
    """Frames are sorted; masks stand in the order of the file's own list, whatever that is."""
    root, masks = tmp_path / "in", {name: trees.box(5 + 10 * n, 4) for n, name in enumerate(names)}
    video, rles = "a/v", [trees.rle(masks[name]) for name in names]
    expressions = {"0": {"exp": "it", "anno_id": [1]}}
    content = {"videos": {video: {"expressions": expressions, "frames": names}}}
    trees.write_json(root / "meta_expressions_valid_.json", content)
    trees.write_json(root / "mask_dict.json", {"1": rles})
    trees.write_json(root / "mask_dict_foreground.json", {video: {"masks_rle": rles}})
    trees.frames_in(root / "JPEGImages" / video, names)
    _, clips, source = prepared_clips("revos", lambda root: root, tmp_path, "valid")
    expected = sorted(names, key=lambda name: (len(name), name))
    assert_frames(clips[0], root / "JPEGImages" / video, expected)
    assert_masks(clips[0], [masks[name] for name in expected])
    for rle, name in zip(source.video(0).objects[FOREGROUND], expected, strict=True):
        np.testing.assert_array_equal(decode_mask(rle, HEIGHT, WIDTH), masks[name])


def test_mevis_valid_has_no_truth(tmp_path):
    content, clips, _ = prepared_clips("mevis", trees.mevis, tmp_path, "valid")
    assert len(clips) == 2 and set(clips[0].masks) == {None}
    assert content["truth"] == {"valid": False} and content["summary"]["valid"]["problems"] == {}


def test_revos(tmp_path):
    content, clips, source = prepared_clips("revos", trees.revos, tmp_path, "valid")
    assert [clip.kind for clip in clips] == ["referring", "reasoning", "non-existent"]
    assert clips[0].video_id == "OVIS/valid/3ba3"
    assert_masks(clips[0], union(MEVIS_OBJECTS["17"]))
    assert_masks(clips[1], union(MEVIS_OBJECTS["4"], MEVIS_OBJECTS["17"]))
    assert set(clips[2].masks) == {None}
    everything = union(*MEVIS_OBJECTS.values())
    for rle, mask in zip(source.video(0).objects[FOREGROUND], everything, strict=True):
        np.testing.assert_array_equal(decode_mask(rle, HEIGHT, WIDTH), mask)
    assert content["summary"]["valid"]["problems"] == {}


@pytest.mark.parametrize("tree", [trees.lv_vis_by_visa, trees.lv_vis_official])
def test_lv_vis(tmp_path, tree):
    _, clips, _ = prepared_clips("lv_vis", tree, tmp_path, "train")
    found = {clip.query: clip for clip in clips}
    assert set(found) == {"horse", "cart" if tree is trees.lv_vis_by_visa else "toy cart"}
    assert_masks(found["horse"], union(MEVIS_OBJECTS["4"], MEVIS_OBJECTS["17"]))
    assert_masks(found[(set(found) - {"horse"}).pop()], union(MEVIS_OBJECTS["23"]))
    assert clips[0].video_id == "00007"


def test_reason_vos(tmp_path):
    _, clips, _ = prepared_clips("reason_vos", trees.reason_vos, tmp_path, "test")
    assert [(clip.expression_id, clip.query) for clip in clips] == [
        ("MeViS_race_2/0", "who wins?"),
        ("MeViS_race_1/1", "who loses?"),
    ]
    assert_masks(clips[0], union(MEVIS_OBJECTS["17"]))
    assert_masks(clips[1], union(MEVIS_OBJECTS["4"]))


def test_reason_vos_with_numbers_that_repeat(tmp_path):
    """An object has several expressions, two of them share a number with another object's, two with each other."""

    def tree(root: Path) -> Path:
        trees.reason_vos(root)
        pairs = [(2, 0), (2, 1), (1, 0), (1, 0)]
        expressions = [{"obj_id": obj, "exp_id": number, "exp_text": f"{obj} {number}"} for obj, number in pairs]
        content = {"videos": {"race": {"source": "MeViS", "expressions": expressions}}}
        trees.write_json(root / "meta_expressions.json", content)
        return root

    _, clips, source = prepared_clips("reason_vos", tree, tmp_path, "test")
    assert [(clip.expression_id, clip.query) for clip in clips] == [
        ("MeViS_race_2/0", "2 0"),
        ("MeViS_race_2/1", "2 1"),
        ("MeViS_race_1/0_2", "1 0"),
        ("MeViS_race_1/0_3", "1 0"),
    ]
    assert_masks(clips[1], union(MEVIS_OBJECTS["17"]))
    assert_masks(clips[2], union(MEVIS_OBJECTS["4"]))


def test_what_was_there_already_is_said_to_be_as_it_was(tmp_path, capsys):
    words = ["prepare", "mevis", "--source", str(trees.mevis(tmp_path / "in")), "--out", str(tmp_path / "out")]
    words += ["--split", "valid_u", "--workers", "1"]
    main(words)
    first = capsys.readouterr()
    main(words)
    again = capsys.readouterr()
    assert first.out == again.out and "already" not in first.err
    assert "out was there already and is as it was: delete it to prepare it anew" in again.err


def test_the_cores_are_those_that_a_process_may_use():
    code = "import os; from revseg_jax.data.processes import cores\n"
    code += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_frames_stand_in_the_order_in_which_a_person_numbers_them(tmp_path):
    names = [f"frame_{t}" for t in (9, 10, 11)]

    def tree(root: Path) -> Path:
        masks = {"0": [trees.rle(trees.box(t, t, 5)) for t in range(3)]}
        video = {"expressions": {"0": {"exp": "it", "obj_id": [0], "anno_id": [0]}}, "frames": names}
        trees.write_json(root / "train/meta_expressions.json", {"videos": {"v": video}})
        trees.write_json(root / "train/mask_dict.json", masks)
        trees.frames_in(root / "train/JPEGImages/v", names)
        return root

    _, (clip,), _ = prepared_clips("mevis", tree, tmp_path, "train")
    assert list(clip.frame_names) == names
    assert_masks(clip, [trees.box(t, t, 5) for t in range(3)])


def square(x: int, y: int, side: int) -> list[tuple[int, int]]:
    """Corners of a polygon that covers side x side pixels."""
    return [(x, y), (x + side - 1, y), (x + side - 1, y + side - 1), (x, y + side - 1)]


@pytest.mark.parametrize("big", ["target", "ignore"])
@pytest.mark.parametrize("big_first", [True, False])
def test_reason_seg_paints_small_polygons_over_large_ones(tmp_path, big, big_first):
    """A target in a region to ignore stays a target, and the other way round."""
    small = "ignore" if big == "target" else "target"

    def tree(root: Path) -> Path:
        trees.frames_in(root / "val", ["1"])
        shapes = [{"label": big, "points": square(4, 4, 36)}, {"label": small, "points": square(14, 14, 10)}]
        content = {"text": ["it"], "shapes": shapes if big_first else shapes[::-1]}
        trees.write_json(root / "val/1.json", content)
        return root

    _, clips, source = prepared_clips("reason_seg", tree, tmp_path, "val")
    inner = trees.box(14, 14, 10)
    masks = {big: trees.box(4, 4, 36) & ~inner, small: inner}
    assert_masks(clips[0], [masks["target"]])
    np.testing.assert_array_equal(decode_mask(source.video(0).objects[VOID][0], HEIGHT, WIDTH), masks["ignore"])


def test_reason_seg_leaves_out_nothing_but_flags(tmp_path):
    def tree(root: Path) -> Path:
        trees.frames_in(root / "val", ["1"])
        labels = {"Flag": square(0, 0, 4), "flagpole": square(10, 10, 6), "ignore flag": square(30, 10, 6)}
        shapes = [{"label": label, "points": points} for label, points in labels.items()]
        trees.write_json(root / "val/1.json", {"text": ["it"], "shapes": shapes})
        return root

    _, clips, source = prepared_clips("reason_seg", tree, tmp_path, "val")
    assert_masks(clips[0], [trees.box(10, 10, 6)])
    void = decode_mask(source.video(0).objects[VOID][0], HEIGHT, WIDTH)
    np.testing.assert_array_equal(void, trees.box(30, 10, 6))


def test_polygons_are_measured_inside_the_frame():
    """The larger polygon has fewer pixels of the frame, so it is painted last."""
    outside = [(WIDTH - 4, 0), (WIDTH + 99, 0), (WIDTH + 99, HEIGHT), (WIDTH - 4, HEIGHT)]
    found = polygon_masks([("a", outside), ("b", square(WIDTH - 30, 0, 30))], HEIGHT, WIDTH)
    assert decode_mask(found["a"][0], HEIGHT, WIDTH).sum() == 4 * HEIGHT
    assert decode_mask(found["b"][0], HEIGHT, WIDTH).sum() == 26 * 30


def test_reason_seg(tmp_path):
    _, clips, source = prepared_clips("reason_seg", trees.reason_seg, tmp_path, "val")
    assert [(clip.video_id, clip.query) for clip in clips] == [
        ("9", "the caf\u00e9\u2019s sign"),
        ("12_a", "what keeps one warm?"),
        ("12_a", "something of wool"),
    ]
    target = np.zeros((HEIGHT, WIDTH), bool)
    target[4:21, 4:21] = target[10:19, 40:51] = True  # outlines belong to a polygon
    assert len(clips[0].frames) == 1
    assert_masks(clips[0], [target])
    void = decode_mask(source.video(0).objects[VOID][0], HEIGHT, WIDTH)
    assert void[30:41, 60:71].all() and void.sum() == 121


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_turned_as_their_polygons_were_drawn(tmp_path, orientation):
    """A camera held upside down or sideways: the file's pixels lie otherwise than what its EXIF data show."""
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[20:36, 8:32] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation

    def tree(root: Path) -> Path:
        (root / "val").mkdir(parents=True)
        stored = np.ascontiguousarray(np.rot90(shown, {3: 2, 6: 1}[orientation]))
        Image.fromarray(stored).save(root / "val/1.jpg", exif=exif, quality=95)
        points = [(8, 20), (31, 20), (31, 35), (8, 35)]
        trees.write_json(root / "val/1.json", {"text": ["it"], "shapes": [{"label": "target", "points": points}]})
        return root

    _, clips, _ = prepared_clips("reason_seg", tree, tmp_path, "val", strict=True)
    assert_masks(clips[0], [shown[..., 0] > 0])
    np.testing.assert_array_equal(decode_frame(clips[0].frames[0])[..., 0] > 128, shown[..., 0] > 0)
    assert Image.open(io.BytesIO(clips[0].frames[0])).getexif() == {}  # nobody turns it a second time


def test_splits_that_are_there_are_taken(tmp_path):
    content = prepare("mevis", trees.mevis(tmp_path / "in"), tmp_path / "out", workers=1, progress=False)
    assert list(content["expressions"]) == ["train", "valid_u", "valid"]


def test_mixed_datasets_stream_into_examples(tmp_path):
    """From two downloads to batches of one shape: what training sees is what the files say."""
    folders = [tmp_path / name for name in ("mevis", "revos")]
    for name, folder in zip(("mevis", "revos"), folders, strict=True):
        tree = getattr(trees, name)(tmp_path / f"{name}_in")
        prepare(name, tree, folder, ["train"], workers=1, progress=False)
    source = ClipSource(folders, "train", [1, 1])
    chain = ChainConfig(frames=6, frame_size=28, keyframe_size=56)
    steps = training_steps(source, chain, 4, seed=0)
    seen = set()
    for batch in (next(steps), next(steps)):
        assert batch.frames.shape == (4, 6, 28, 28, 3) and batch.frame_count.tolist() == [4] * 4
        assert [pair in {("377b1c5f365c", "0"), ("377b1c5f365c", "1")} for pair in ids(batch)] == [True, False] * 2
        seen |= set(ids(batch))
        for b, pair in enumerate(ids(batch)):
            if pair == ("377b1c5f365c", "1"):
                assert batch.boxes[b, :4, 0].tolist() == [40, 43, 46, 49] and batch.areas[b, 0] == 144
            if pair == ("OVIS/train/3ba3", "2"):
                assert not batch.areas[b].any()
    assert len(seen) == 5


def ids(batch) -> list[tuple[str, str]]:
    return list(zip(batch.video_id, batch.expression_id, strict=True))


# --- killed ----------------------------------------------------------------------------------------------------------


def test_killed_and_started_again(tmp_path, capsys):
    """After SIGKILL there is no folder; the next start keeps the finished parts; the result is as if never stopped."""
    root, out = trees.many_videos(tmp_path / "in", 40), tmp_path / "out"
    slow = "import os, time, revseg_jax.data.prepare as p\nb = p.build_record\n"
    slow += "p.build_record = lambda *a: (time.sleep(0.05), b(*a))[1]\n"
    slow += f"p.prepare('mevis', {str(root)!r}, {str(out)!r}, workers=1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob(".out.*.partial/part-*.json"))) >= 2 or process.poll() is not None)
    finished = sorted(tmp_path.glob(".out.*.partial/part-*.json"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and len(finished) >= 2
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    kept = []
    write_part = writer._write_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writer, "_write_part", lambda work, number, *rest: kept.append(number) or write_part(work, number, *rest)
        )
        main(["prepare", "mevis", "--source", str(root), "--out", str(out), "--workers", "1"])
    assert not {int(path.stem.removeprefix("part-")) for path in stamps} & set(kept) and kept
    whole = prepare("mevis", root, tmp_path / "whole", workers=1, progress=False)
    assert read_prepared(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
    assert whole["fingerprint"] in capsys.readouterr().out


def test_workers_die_with_the_command(tmp_path):
    """They would go on writing beside the next start, and wait for work for ever."""
    root, out = trees.many_videos(tmp_path / "in", 200), tmp_path / "out"
    code = "from revseg_jax.data.prepare import prepare\nif __name__ == '__main__':\n"
    code += f"    prepare('mevis', {str(root)!r}, {str(out)!r}, workers=2, progress=False)"
    (tmp_path / "command.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "command.py")], stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob(".out.*.partial/part-*.json")) or process.poll() is not None)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not out.exists()
    wait_for(lambda: not any(map(running, workers)), 20)


def test_many_processes_write_the_same(tmp_path):
    root = trees.many_videos(tmp_path / "in", 20)
    alone = prepare("mevis", root, tmp_path / "alone", workers=1, progress=False)
    together = prepare("mevis", root, tmp_path / "together", workers=2, progress=False)
    assert alone == together
    a, b = (ClipSource([tmp_path / name], "train") for name in ("alone", "together"))
    assert len(a) == 20 and all(a[i] == b[i] for i in range(20))


def test_two_commands_at_once_are_refused(tmp_path):
    root = trees.mevis(tmp_path / "in")
    settings = {"dataset": "mevis", "version": VERSION, "source": str(root.resolve()), "splits": ["train"]}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    work = tmp_path / f".out.{digest}.partial"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            prepare("mevis", root, tmp_path / "out", ["train"], workers=1, progress=False)
