"""`revseg prepare` on downloads that are damaged or not what they should be: what is wrong is named, and counted."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import dataset_trees as trees
import numpy as np
import pytest
from dataset_trees import HEIGHT, MEVIS_OBJECTS, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from prepared_datasets import assert_masks, prepared_clips, union

from revseg_jax.cli import main
from revseg_jax.data import writer
from revseg_jax.data.clip import decode_mask
from revseg_jax.data.datasets.listing import Problem
from revseg_jax.data.datasets.masks import run_length_masks
from revseg_jax.data.prepare import prepare
from revseg_jax.data.run_lengths import run_lengths
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError


def damaged_mevis(root: Path) -> Path:
    """Videos with something of their own wrong each, and one that is right."""
    trees.mevis(root)
    folder = root / "valid_u"
    meta, masks = json.loads((folder / "meta_expressions.json").read_text()), {}
    good = [trees.rle(mask) for mask in MEVIS_OBJECTS["4"]]
    names = [f"{t:05d}" for t in range(4)]
    videos = {"good": {"0": {"exp": "a", "anno_id": [1]}}}
    masks["1"] = good
    videos["no_frame"] = videos["bad_frame"] = videos["sizes"] = videos["good"]
    videos["masks"] = {
        "0": {"exp": "wrong size", "anno_id": [2]},
        "1": {"exp": "too few", "anno_id": [3]},
        "6": {"exp": "cut off", "anno_id": [7]},
        "7": {"exp": "no mask", "anno_id": [8]},
        "2": {"exp": "no object", "anno_id": []},
        "3": {"exp": "unknown", "anno_id": [1, 99]},
        "4": {"exp": " ", "anno_id": [1]},
        "5": {"exp": "fine", "anno_id": [1]},
    }
    masks["2"] = [*good[:2], trees.rle(trees.box(1, 1, height=HEIGHT // 2)), None]
    masks["3"] = good[:3]
    masks["7"] = [{**good[0], "counts": good[0]["counts"][:-2]}, *good[1:]]
    masks["8"] = [*good[:3], {"size": [HEIGHT, WIDTH]}]
    for number, name in enumerate(videos):
        trees.frames_in(folder / "JPEGImages" / name, names, seed=number)
    (folder / "JPEGImages/no_frame/00002.jpg").unlink()
    cut = folder / "JPEGImages/bad_frame/00001.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    (folder / "JPEGImages/sizes/00003.jpg").unlink()
    trees.frames_in(folder / "other", ["x"], height=HEIGHT * 2)
    (folder / "other/x.jpg").rename(folder / "JPEGImages/sizes/00003.jpg")
    meta["videos"] = {name: {"expressions": e, "frames": names} for name, e in videos.items()}
    (folder / "meta_expressions.json").write_text(json.dumps(meta))
    (folder / "mask_dict.json").write_text(json.dumps(masks))
    return root


def test_ids_in_colour_are_refused(tmp_path):
    """Palette images that somebody saved as RGB: colours are no ids. Where all channels agree they are."""
    root = trees.ref_youtube_vos(tmp_path / "in")
    folder = root / "train/Annotations/0a1b"
    grey = Image.fromarray(np.asarray(Image.open(folder / "00000.png")))
    grey.convert("RGB").save(folder / "00000.png")
    prepare("ref_youtube_vos", root, tmp_path / "grey", ["train"], workers=1, progress=False)
    assert_masks(ClipSource([tmp_path / "grey"], "train")[1], union(trees.YTVOS_OBJECTS[1]))
    Image.open(folder / "00005.png").convert("RGB").save(folder / "00005.png")
    with pytest.raises(InputError, match="0a1b/00005.png is in colour"):
        prepare("ref_youtube_vos", root, tmp_path / "colour", ["train"], strict=True, workers=1, progress=False)


def test_an_image_of_one_object_may_have_any_colour(tmp_path):
    def tree(root: Path) -> Path:
        file = trees.reason_vos(root) / "Annotations/MeViS_race_2/00000.png"
        pixels = (np.asarray(Image.open(file)) > 0)[..., None] * np.array([0, 0, 2], np.uint8)
        Image.fromarray(pixels).save(file)
        return root

    _, clips, _ = prepared_clips("reason_vos", tree, tmp_path, "test")
    assert_masks(clips[0], union(MEVIS_OBJECTS["17"]))


def test_bad_data_is_named_and_counted(tmp_path):
    content, clips, _ = prepared_clips("mevis", damaged_mevis, tmp_path, "valid_u")
    assert [(clip.video_id, clip.expression_id) for clip in clips] == [("good", "0"), ("masks", "5")]
    summary = content["summary"]["valid_u"]
    assert summary["videos"] == 2 and summary["skipped_videos"] == 3
    assert summary["problems"] == {
        "bad mask": 4,
        "empty expression": 1,
        "expression of a bad mask": 4,
        "expression without objects": 1,
        "frames of several sizes": 1,
        "missing frame": 1,
        "unknown object": 1,
        "unreadable frame": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / writer.PROBLEMS).read_text().splitlines()]
    assert len(lines) == sum(summary["problems"].values())
    messages = {line["cause"]: line["message"] for line in lines}
    assert "JPEGImages/no_frame/00002.jpg" in messages["missing frame"]
    assert "JPEGImages/bad_frame/00001.jpg" in messages["unreadable frame"]
    assert "masks" in messages["unknown object"] and "99" in messages["unknown object"]
    assert any("80x24" in line["message"] and "annotation 2" in line["message"] for line in lines)
    assert any("3 masks for 4 frames" in line["message"] for line in lines)
    assert any("annotation 7: the" in line["message"] and "frame 0" in line["message"] for line in lines)
    assert any("annotation 8: the mask of frame 3 is no COCO RLE" in line["message"] for line in lines)


@pytest.mark.parametrize("masks", [None, "none", [{"size": [64]}] * 4, [{"size": [48, 80], "counts": None}] * 4])
def test_masks_that_are_none_are_named(tmp_path, masks):
    root = trees.lv_vis_official(tmp_path / "in")
    file = root / "train_instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentations"] = masks
    file.write_text(json.dumps(content))
    prepared = prepare("lv_vis", root, tmp_path / "out", ["train"], workers=1, progress=False)
    assert prepared["summary"]["train"]["problems"]["bad mask"] == 1
    content["videos"][0]["file_names"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not in the form of YouTube-VIS"):
        prepare("lv_vis", root, tmp_path / "again", ["train"], workers=1, progress=False)


@pytest.mark.parametrize("points", [None, [[1]], [["a", "b"]], [[float("nan"), 5], [1, 2]]])
def test_polygons_that_are_none_are_named(tmp_path, points):
    root = trees.reason_seg(tmp_path / "in")
    annotation = json.loads((root / "val/12_a.json").read_text())
    annotation["shapes"][0]["points"] = points
    (root / "val/12_a.json").write_text(json.dumps(annotation))
    prepared = prepare("reason_seg", root, tmp_path / "out", ["val"], workers=1, progress=False)
    assert prepared["summary"]["val"]["problems"] == {"bad annotation": 1}


def test_a_frame_that_cannot_be_opened_is_a_problem_of_its_video(tmp_path):
    root = trees.mevis(tmp_path / "in")
    frame = next((root / "valid_u/JPEGImages").glob("*/00002.jpg"))
    frame.unlink()
    frame.mkdir()
    with pytest.raises(InputError, match=f"{frame.name} .*: Is a directory"):
        prepare("mevis", root, tmp_path / "out", ["valid_u"], strict=True, workers=1, progress=False)


@settings(deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_lengths_are_those_of_the_pixels(mask):
    expected = trees.uncompressed(mask)["counts"]
    assert run_lengths(trees.rle(mask)["counts"].encode()).tolist() == expected


@settings(deadline=None)
@given(st.binary(max_size=30), st.integers(1, 12), st.integers(1, 12))
def test_damaged_run_lengths_never_pass(counts, height, width):
    """Whatever the bytes: either a mask that the COCO API decodes to as many pixels, or a named problem."""
    rle = {"size": [height, width], "counts": counts}
    found = run_length_masks("v", {"1": [rle]}, 1, Path("f"), height, width)["1"]
    if isinstance(found, Problem):
        assert found.cause == "bad mask"
    elif found[0] is not None:
        assert decode_mask(found[0], height, width).sum() == run_lengths(counts)[1::2].sum() > 0


def test_strict_stops_at_the_first_problem(tmp_path):
    with pytest.raises(InputError, match="00001.jpg .video bad_frame. is no readable JPEG"):
        prepared_clips("mevis", damaged_mevis, tmp_path, "valid_u", strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "valid_u"])
def test_a_target_that_is_never_visible_is_not_trained_on(tmp_path, split):
    """As of a wrong id. Benchmarks count it."""

    def tree(root: Path) -> Path:
        trees.mevis(root)
        masks = json.loads((root / split / "mask_dict.json").read_text())
        trees.write_json(root / split / "mask_dict.json", masks | {"23": [None] * len(masks["23"])})
        return root

    before = prepared_clips("mevis", trees.mevis, tmp_path / "before", split)[1]
    content, clips, _ = prepared_clips("mevis", tree, tmp_path / "after", split)
    lost = [clip.query for clip in before if not any(c.query == clip.query and any(c.masks) for c in clips)]
    assert len(lost) == 1 and len(before) - len(clips) == (split == "train")
    assert content["summary"][split]["problems"].get("target never visible", 0) == (split == "train")


def test_strict_leaves_nothing_where_nothing_was_written(tmp_path):
    root = trees.mevis(tmp_path / "in")
    shutil.rmtree(next((root / "valid_u/JPEGImages").iterdir()))
    with pytest.raises(InputError, match="valid_u"):
        prepare("mevis", root, tmp_path / "out", ["valid_u"], strict=True, workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_strict_forgives_nothing_that_was_written_without_it(tmp_path, monkeypatch):
    """Neither parts, which are built again, nor a complete folder."""
    root = damaged_mevis(tmp_path / "in")
    build = partial(prepare, "mevis", root, tmp_path / "out", ["valid_u"], workers=1, progress=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as all_but_the_end, pytest.raises(KeyboardInterrupt):
        all_but_the_end.setattr(writer, "_finish", interrupt)
        build()
    with pytest.raises(InputError, match="00001.jpg .video bad_frame. is no readable JPEG"):
        build(strict=True)
    build()
    source = ClipSource([tmp_path / "out"], "valid_u")  # what was written before --strict stopped is whole
    assert [source[i].video_id for i in range(len(source))] == ["good", "masks"]
    with pytest.raises(InputError, match=f"out was written in spite of the problems in .*{writer.PROBLEMS}"):
        build(strict=True)


def test_a_split_without_anything_usable_is_an_error(tmp_path):
    root = trees.reason_vos(tmp_path / "in")
    next((root / "JPEGImages/race").glob("*.jpg")).write_bytes(b"")
    with pytest.raises(InputError, match="nothing usable.*00000.jpg|nothing usable.*no readable JPEG"):
        prepare("reason_vos", root, tmp_path / "out", workers=1, progress=False)


def test_a_split_without_videos_is_an_error(tmp_path):
    root = trees.mevis(tmp_path / "in")
    trees.write_json(root / "train/meta_expressions.json", {"videos": {}})
    with pytest.raises(InputError, match="the split 'train' of mevis holds nothing usable: it is empty"):
        prepare("mevis", root, tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize(("text", "words"), [("\ud800", r"holds '\\ud800', half a character"), ("\ud83d\ude97", None)])
def test_half_a_character_is_named(tmp_path, text, words):
    root = trees.mevis(tmp_path / "in")
    meta = root / "train/meta_expressions.json"
    content = json.loads(meta.read_text())
    next(iter(content["videos"].values()))["expressions"]["0"]["exp"] = f"the {text}"
    trees.write_json(meta, content)  # in ASCII, as the published ones
    with pytest.raises(InputError, match=words) if words else nullcontext():
        prepare("mevis", root, tmp_path / "out", ["train"], workers=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mevis", "--out", "{}/out"], "--source"),
        (["mevis", "--source", "{}/nowhere", "--out", "{}/out"], "nowhere"),
        (["mevis", "--source", "{}", "--out", "{}/out"], "does not look like mevis"),
        (["mevis", "--source", "{}", "--out", "{}/out", "--split", "test"], "no split 'test'"),
        (["mevis", "--source", "{}", "--out", "{}/out", "--split", "train"], "mask_dict.json: No such file"),
        (["kinetics", "--source", "{}", "--out", "{}/out"], "kinetics is not one of"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *(argument.format(tmp_path) for argument in arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_a_file_of_another_form_is_one_line(tmp_path):
    trees.write_json(tmp_path / "in/train/meta_expressions.json", {"videos": {"a": {"frames": []}}})
    trees.write_json(tmp_path / "in/train/mask_dict.json", {})
    with pytest.raises(InputError, match="meta_expressions.json is not as mevis has it"):
        prepare("mevis", tmp_path / "in", tmp_path / "out", ["train"], progress=False)


def test_what_was_repaired_is_read_again(tmp_path):
    """After --strict has stopped, finished parts are kept, but not those whose videos have changed since."""
    root = trees.many_videos(tmp_path / "in", 20)
    bad = root / "train/JPEGImages/0019/00002.jpg"
    content = bad.read_bytes()
    bad.unlink()
    with pytest.raises(InputError, match="0019/00002.jpg is missing"):
        prepare("mevis", root, tmp_path / "out", strict=True, workers=1, progress=False)
    bad.write_bytes(content)
    meta = json.loads((root / "train/meta_expressions.json").read_text())
    meta["videos"]["0000"]["expressions"]["0"]["exp"] = "said better"
    (root / "train/meta_expressions.json").write_text(json.dumps(meta))
    prepare("mevis", root, tmp_path / "out", strict=True, workers=1, progress=False)
    source = ClipSource([tmp_path / "out"], "train")
    assert source[0].query == "said better" and len(source) == 20


@pytest.mark.parametrize(
    ("tree", "split", "file"),
    [
        (trees.mevis, "valid_u", "valid_u/JPEGImages/377b1c5f365c/00001.jpg"),
        (trees.mevis, "valid_u", "valid_u/mask_dict.json"),
        (trees.revos, "train", "mask_dict.json"),
        (trees.revos, "valid", "mask_dict_foreground.json"),
        (trees.lv_vis_by_visa, "train", "train/mask_dict.json"),
        (trees.lv_vis_official, "train", "train_instances.json"),
        (trees.ref_youtube_vos, "train", "train/Annotations/0a1b/00005.png"),
        (trees.ref_davis17, "valid", "valid/Annotations/blackswan/00002.png"),
        (trees.reason_vos, "test", "Annotations/MeViS_race_1/00003.png"),
        (trees.reason_seg, "val", "val/9.json"),
    ],
)
def test_a_part_is_built_again_when_a_frame_or_mask_file_has_changed(tmp_path, monkeypatch, tree, split, file):
    root, dataset = tree(tmp_path / "in"), tree.__name__.removesuffix("_official").removesuffix("_by_visa")

    def interrupt(*_):
        raise KeyboardInterrupt

    def built() -> int:
        with pytest.raises(KeyboardInterrupt):
            prepare(dataset, root, tmp_path / "out", [split], workers=1, progress=False)
        return next(tmp_path.glob(".out.*.partial/part-00000.json")).stat().st_mtime_ns

    monkeypatch.setattr(writer, "_finish", interrupt)
    first = built()
    assert built() == first
    os.utime(root / file, ns=(0, (root / file).stat().st_mtime_ns + 1))
    assert built() > first
