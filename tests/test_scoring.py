"""Benchmarks and submissions from predictions on disk, against sums made by hand."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import dataset_trees as trees
import numpy as np
import pytest
from dataset_trees import HEIGHT, WIDTH
from PIL import Image
from prepared_datasets import jf

from revseg_jax import evaluate
from revseg_jax.cli import main
from revseg_jax.config import load_config
from revseg_jax.data.clip import decode_mask, encode_mask
from revseg_jax.data.prepare import prepare
from revseg_jax.data.records import FOREGROUND, VOID, VideoExpression, VideoTruth
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.evaluation.benchmarks import BENCHMARKS, find_data, left_out
from revseg_jax.evaluation.predictions import clear_partial, prediction_folder, write_prediction
from revseg_jax.evaluation.protocols import Row, rows_of
from revseg_jax.evaluation.scoring import ExpressionScore, VideoScores, score_benchmark, score_video
from revseg_jax.evaluation.submission import check_submission, write_submission

TREES = {
    "ref_youtube_vos": trees.ref_youtube_vos,
    "ref_davis17": trees.ref_davis17,
    "mevis": trees.mevis,
    "revos": trees.revos,
    "reason_vos": trees.reason_vos,
    "reason_seg": trees.reason_seg,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Every dataset, prepared: <root>/<dataset>."""
    root = tmp_path_factory.mktemp("prepared")
    for name, tree in TREES.items():
        source = tree(tmp_path_factory.mktemp("download") / name)
        prepare(name, source, root / name, workers=1, progress=False)
    return root


def truths(data: Path, name: str) -> dict[tuple[str, str], np.ndarray]:
    source = ClipSource([data / BENCHMARKS[name].dataset], BENCHMARKS[name].split)
    clips = [source[i] for i in range(len(source))]
    return {
        (c.video_id, c.expression_id): np.stack([decode_mask(m, c.height, c.width) for m in c.masks]) for c in clips
    }


def names_of(data: Path, name: str) -> dict[tuple[str, str], tuple[str, ...]]:
    source = ClipSource([data / BENCHMARKS[name].dataset], BENCHMARKS[name].split)
    return {key: source[i].frame_names for i, key in enumerate(source.ids())}


def write_all(data: Path, name: str, root: Path, change=lambda key, masks: masks) -> dict:
    """Predictions made of the truth; `change` may alter them or give None for none. Returns what was written."""
    written, names = {}, names_of(data, name)
    for key, truth in truths(data, name).items():
        masks = change(key, truth.copy())
        if masks is not None:
            write_prediction(prediction_folder(root, *key), names[key], masks)
            written[key] = masks
    return written


def rows(data: Path, name: str, root: Path) -> dict[str, Row]:
    benchmark = BENCHMARKS[name]
    scores = score_benchmark(benchmark, data / benchmark.dataset, root, workers=1, progress=False)
    return {row.title: row for row in rows_of(benchmark, scores)}


def shifted(key, masks: np.ndarray) -> np.ndarray:
    return np.roll(masks, 1 + len(key[1]) + int(key[1]) % 5, axis=2)


@pytest.mark.parametrize("name", ["mevis_valid_u", "revos", "reason_vos", "reason_seg_val"])
def test_the_truth_scores_100(tmp_path, data, name):
    write_all(data, name, tmp_path)
    for row in rows(data, name, tmp_path).values():
        assert row.missing == 0 and {row.j, row.f, row.jf} <= {100, None}
        assert all(value == pytest.approx(100, abs=1e-3) for value in row.others.values())


def test_an_object_of_davis_that_nobody_names_is_not_found(tmp_path, data):
    """Two of three objects are perfect in (a); (b) knows expressions only."""
    write_all(data, "ref_davis17", tmp_path)
    found = rows(data, "ref_davis17", tmp_path)
    a, b = found["Ref-DAVIS17 (a)"], found["Ref-DAVIS17 (b)"]
    assert (a.j, a.f, a.jf) == pytest.approx((200 / 3,) * 3) and a.missing == 0
    assert (b.j, b.f, b.jf) == (100, 100, 100) and b.expressions == 8


def test_mean_over_frames_then_over_expressions(tmp_path, data):
    written = write_all(data, "mevis_valid_u", tmp_path, shifted)
    truth = truths(data, "mevis_valid_u")
    j, f = np.mean([jf(masks, truth[key]) for key, masks in written.items()], axis=0)
    row = rows(data, "mevis_valid_u", tmp_path)["MeViS valid_u"]
    assert 0 < row.j < 100 and (row.j, row.f, row.jf) == pytest.approx((j, f, (j + f) / 2))
    assert (row.expressions, row.missing) == (2, 0)


def test_missing_predictions_count_nothing(tmp_path, data):
    """ReasonVOS: one of two is there and right. 0 for the other, or left out as the official script does."""
    write_all(data, "reason_vos", tmp_path, lambda key, masks: masks if key[1] == "MeViS_race_1/1" else None)
    found = rows(data, "reason_vos", tmp_path)
    assert found["ReasonVOS"].jf == 50 and found["ReasonVOS"].missing == 1
    official = found["ReasonVOS, official script"]
    assert official.jf == 100 and official.expressions == 1 and "flatters" in official.protocol


def test_reason_vos_lies_as_its_own_scripts_have_it(tmp_path, data):
    names = [f"{t:05d}" for t in range(4)]
    for obj, number, masks in ((2, 0, trees.MEVIS_OBJECTS["17"]), (1, 1, trees.MEVIS_OBJECTS["4"])):
        for name, mask in zip(names, masks, strict=True):
            file = tmp_path / f"MeViS_race_{obj}/{number}/{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(np.zeros((HEIGHT, WIDTH)) if mask is None else mask) * 255).save(file)
    row = rows(data, "reason_vos", tmp_path)["ReasonVOS"]
    assert (row.jf, row.missing) == (100, 0)
    (tmp_path / "by_video/race/1").mkdir(parents=True)
    with pytest.raises(InputError, match="any of the 1 videos, such as MeViS_race_2/0"):
        rows(data, "reason_vos", tmp_path / "by_video")


def test_what_prepare_left_out_is_said(tmp_path, monkeypatch):
    """Beside the numbers; and no server gets a part of a benchmark."""
    root = trees.mevis(tmp_path / "in")
    for split in ("valid", "valid_u"):
        content = json.loads((root / split / "meta_expressions.json").read_text())
        content["videos"]["lost"] = next(iter(content["videos"].values()))
        trees.write_json(root / split / "meta_expressions.json", content)
    prepare("mevis", root, tmp_path / "mevis", ["valid", "valid_u"], workers=1, progress=False)
    words = "prepare left out what [1-9] problems concern, 1 whole videos among it"
    write_all(tmp_path, "mevis", tmp_path / "p")
    with pytest.raises(InputError, match=f"no submission can be made: {words}: mend them"):
        write_submission(BENCHMARKS["mevis"], tmp_path / "mevis", tmp_path / "p", tmp_path / "s.zip")
    assert not (tmp_path / "s.zip").exists()
    found = rows_of(BENCHMARKS["mevis_valid_u"], [], left_out(tmp_path / "mevis", "valid_u"))
    assert re.search(words, found[0].protocol)
    # What was computed for days is not lost for want of a zip.
    monkeypatch.setattr(evaluate, "_predict_all", lambda config, data, folder, sampled: {})
    config = load_config(None, ["run.dir=.", f"data.test=[{tmp_path / 'mevis'}]"])
    shutil.copytree(tmp_path / "p", tmp_path / "out/mevis/predictions")
    (row,) = evaluate.main(config, ["mevis"], str(tmp_path / "out"))
    assert re.search(f"no zip for the server: {words}", row.protocol) and (tmp_path / "out/results.md").exists()
    assert not (tmp_path / "out/mevis/submission.zip").exists()


def test_training_and_held_out_scores_need_truth(data):
    with pytest.raises(InputError, match="the truth of the split 'valid' is not public"):
        ClipSource([data / "mevis"], "valid", with_truth=True)
    ClipSource([data / "mevis"], "valid_u", with_truth=True)


def test_what_a_killed_process_was_writing_is_taken_away(tmp_path):
    """Also below the nested folders of ReVOS's videos."""
    for folder in (tmp_path / "video/.0.12.partial", tmp_path / "a/b/video/.0.12.partial", tmp_path / "a/b/video/0"):
        folder.mkdir(parents=True)
        (folder / "00000.png").touch()
    clear_partial(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == ["00000.png"]
    assert (tmp_path / "a/b/video/0/00000.png").exists()


def test_revos(tmp_path, data):
    """Overall is the unweighted mean of the two kinds. What is said about nothing enters an R of its own alone."""

    def change(key, masks):
        if key[1] == "1":
            return None
        if key[1] == "2":
            masks[:] = trees.box(0, 0, 10)
        return masks

    write_all(data, "revos", tmp_path, change)
    found = rows(data, "revos", tmp_path)
    assert found["ReVOS referring"].jf == 100 and found["ReVOS reasoning"].jf == 0
    assert found["ReVOS overall"].jf == 50 and found["ReVOS overall"].missing == 1
    everything = [np.any([m[t] for m in trees.MEVIS_OBJECTS.values() if m[t] is not None], 0) for t in range(4)]
    robustness = np.mean([1 - 100 / mask.sum() for mask in everything])
    others = {"official R": 50, "R of non-existent objects": 100 * robustness}
    assert found["ReVOS overall"].others == pytest.approx(others, abs=1e-3)


def test_the_official_r_of_revos_sums_bytes(tmp_path):
    """Of 0 and 255, which wrap around where an expression's objects overlap: by hand for one pixel too many."""
    a, b, size = trees.box(4, 4, 12), trees.box(10, 4, 12), (HEIGHT, WIDTH)
    objects = {"1": [encode_mask(a)] * 2, "2": [encode_mask(b)] * 2, FOREGROUND: [encode_mask(trees.box(0, 0, 48))] * 2}
    kinds = [("referring", (0, 1)), ("reasoning", (0,)), ("non-existent", ())]
    expressions = [VideoExpression(str(n), "it", *kind) for n, kind in enumerate(kinds)]
    truth = VideoTruth("v", *size, ("0", "1"), objects, expressions)
    for number, mask in enumerate([a | b | trees.box(70, 40, 1), a | trees.box(70, 40, 1), trees.box(0, 0, 12)]):
        frames = np.stack([mask, np.ones(size, bool)])  # the second is so wrong that its R is 0, not negative
        write_prediction(prediction_folder(tmp_path, "v", str(number)), ("0", "1"), frames)
    scores = score_video(truth, BENCHMARKS["revos"], tmp_path).expressions
    everything, both = 48 * 48, (a & b).sum()
    official = [(1 - (255 + both) / everything) / 2, (1 - 255 / everything) / 2, 0]
    assert [score.official_robustness for score in scores] == pytest.approx(official)
    wholes = (1 - (HEIGHT * WIDTH - np.array([(a | b).sum(), a.sum(), 0])) / everything).clip(0)
    assert [score.robustness for score in scores] == pytest.approx(
        (1 - np.array([1, 1, 144]) / everything + wholes) / 2
    )


def test_revos_overall_does_not_weigh_by_the_number_of_expressions():
    def scores(kind, j, robustness):
        return ExpressionScore("v", "0", kind, False, j, j / 2, robustness, j / 3, 0, 0)

    kinds = [("referring", 0.9, 0.0)] * 3 + [("reasoning", 0.3, 0.0)] + [("non-existent", 1.0, r) for r in (0.2, 0.6)]
    found = {row.title: row for row in rows_of(BENCHMARKS["revos"], [VideoScores([scores(*k) for k in kinds], None)])}
    overall = found["ReVOS overall"]
    assert (overall.j, overall.f, overall.jf) == pytest.approx((60, 30, 45)) and overall.expressions == 4
    assert overall.others == pytest.approx({"official R": 20, "R of non-existent objects": 40})
    assert found["ReVOS reasoning"].others == pytest.approx({"official R": 10})


def test_other_peoples_images(tmp_path, data):
    """Whatever is not 0 is the object: palette images with index 1, grey, one bit, any colour."""
    forms = {
        "00000": lambda mask: Image.fromarray(mask.astype(np.uint8), "P"),
        "00001": lambda mask: Image.fromarray(mask.astype(np.uint8)),
        "00002": lambda mask: Image.fromarray(mask),
        "00003": lambda mask: Image.fromarray(mask[..., None] * np.array([0, 0, 1], np.uint8)),
    }
    for (video, expression), truth in truths(data, "mevis_valid_u").items():
        folder = tmp_path / video / expression
        folder.mkdir(parents=True)
        for (name, form), mask in zip(forms.items(), truth, strict=True):
            image = form(mask)
            if image.mode == "P":
                image.putpalette([0, 0, 0, 0, 0, 0])  # both black: the index counts, not the colour
            image.save(folder / f"{name}.png")
    assert rows(data, "mevis_valid_u", tmp_path)["MeViS valid_u"].jf == 100


def test_davis_protocols(tmp_path, data):
    """Annotator 0 swaps the objects: fatal for each expression, repaired by the matching of the merged masks.
    Annotator 1's second mask covers both objects: where masks overlap the first wins, which makes it right.
    Annotator 3 has no prediction of the second object. The third has no expression: nobody finds it.
    Void pixels count for (b) only."""
    objects = [np.stack(trees.DAVIS_OBJECTS[k]) for k in (1, 2)]

    def change(key, masks):
        k, annotator = divmod(int(key[1]), 4)
        if annotator == 0:
            return objects[1 - k]
        if annotator == 1:
            return objects[0] | (objects[1] if k else False)
        if annotator == 3 and k == 1:
            return None
        return masks | trees.box(60, 20, 6) if annotator == 2 and k == 0 else masks

    written = write_all(data, "ref_davis17", tmp_path, change)
    found = rows(data, "ref_davis17", tmp_path)
    assert found["Ref-DAVIS17 (a)"].jf == pytest.approx((200 + 200 + 200 + 100) / 3 / 4)
    truth = truths(data, "ref_davis17")
    j, f = np.sum([jf(masks, truth[key]) for key, masks in written.items()], axis=0) / len(truth)
    assert (found["Ref-DAVIS17 (b)"].j, found["Ref-DAVIS17 (b)"].f) == pytest.approx((j, f))
    assert [row.missing for row in found.values()] == [1, 1]
    assert "counts as empty masks" in found["Ref-DAVIS17 (a)"].protocol
    assert j < 75  # the swap alone costs a quarter


def test_reason_seg(tmp_path, data):
    """gIoU is a mean of ratios, cIoU a ratio of sums; ignored pixels count nowhere, nor does a second question."""

    def change(key, masks):
        if key == ("9", "0"):
            masks[:] = True  # everything, the ignored region too
        return masks if key[1] == "0" else np.zeros_like(masks)

    write_all(data, "reason_seg_val", tmp_path, change)
    row = rows(data, "reason_seg_val", tmp_path)["ReasonSeg val"]
    area = truths(data, "reason_seg_val")["9", "0"].sum()
    scored = HEIGHT * WIDTH - 11 * 11
    assert row.expressions == 2 and row.j is None
    assert row.others["gIoU"] == pytest.approx(100 * (area / scored + 1) / 2)
    assert row.others["cIoU"] == pytest.approx(100 * 2 * area / (scored + area))


def test_a_missing_prediction_has_no_ignored_pixels_either(tmp_path):
    """An absent image and an empty one add the same to the union of cIoU."""
    target, void = trees.box(4, 4, 20), trees.box(14, 4, 20)
    objects = {"target": [encode_mask(target)], VOID: [encode_mask(void)]}
    truth = VideoTruth("1", HEIGHT, WIDTH, ("1",), objects, [VideoExpression("0", "it", "reasoning", (0,))])
    write_prediction(prediction_folder(tmp_path / "empty", "1", "0"), ("1",), np.zeros((1, HEIGHT, WIDTH), bool))
    benchmark = BENCHMARKS["reason_seg_val"]
    scores = [score_video(truth, benchmark, tmp_path / name).expressions[0] for name in ("absent", "empty")]
    assert [score.missing for score in scores] == [True, False]
    assert [score.union for score in scores] == [10 * 20] * 2


def test_scoring_holds_one_prediction_and_its_objects_at_a_time(tmp_path):
    frames, size = 6, (90, 160)
    masks = np.zeros((frames, *size), bool)
    masks[:, 20:40, 30:60] = True
    names, rle = tuple(f"{t:05d}" for t in range(frames)), encode_mask(masks[0])
    peaks = []
    for count in (2, 20):
        expressions = [VideoExpression(str(n), "it", "motion", (n,)) for n in range(count)]
        for expression in expressions:
            write_prediction(prediction_folder(tmp_path, "v", expression.id), names, masks)
        truth = VideoTruth("v", *size, names, {str(n): [rle] * frames for n in range(count)}, expressions)
        tracemalloc.start()
        scores = score_video(truth, BENCHMARKS["mevis_valid_u"], tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [score.j for score in scores.expressions] == [1] * count
    assert peaks[1] - peaks[0] < masks.nbytes


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, data):
    write_all(data, "reason_seg_val", tmp_path, shifted)  # of two videos
    benchmark = BENCHMARKS["reason_seg_val"]
    both = [score_benchmark(benchmark, data / "reason_seg", tmp_path, workers, progress=False) for workers in (1, 2)]
    assert both[0] == both[1]


# --- folders that do not fit -----------------------------------------------------------------------------------------


def broken(root: Path, how: str) -> None:
    file = root / "377b1c5f365c/0/00002.png"
    if how == "missing":
        file.unlink()
    elif how == "size":
        Image.new("L", (WIDTH, HEIGHT + 1)).save(file)
    elif how == "garbage":
        file.write_bytes(b"no image")
    elif how == "other":
        (root / "377b1c5f365c").rename(root / "somewhere_else")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "00002.png is missing"),
        ("size", "00002.png is 80x49 pixels, the video 80x48"),
        ("garbage", "00002.png cannot be read"),
        ("other", "has no folder of any of the 2 videos|such as 377b1c5f365c"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path, capsys, data, how, words):
    write_all(data, "mevis_valid_u", tmp_path / "p")
    broken(tmp_path / "p", how)
    arguments = ["score", str(tmp_path / "p"), "--benchmark", "mevis_valid_u", "--data", str(data), "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and any(word in error for word in words.split("|"))


def test_score_prints_the_published_numbers_beside(tmp_path, capsys, data):
    """The predictions may lie in a folder Annotations, as servers want them."""
    write_all(data, "reason_vos", tmp_path / "Annotations")
    main(["score", str(tmp_path), "--benchmark", "reason_vos", "--data", str(data / "reason_vos"), "--workers", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["ReasonVOS", "100.0", "100.0", "100.0"] and "61.8 / 67.7 / 64.8" in lines[1]


def test_benchmarks_find_their_data(data):
    assert set(find_data([str(data)], ["all"])) == set(BENCHMARKS) - {"synthetic"}
    assert find_data([str(data / "mevis")], ["mevis_valid_u"]) == {"mevis_valid_u": data / "mevis"}
    assert list(find_data([str(data)], ["revos", "ref_davis17"])) == ["ref_davis17", "revos"]  # the papers' order
    with pytest.raises(InputError, match="revseg prepare revos"):
        find_data([str(data / "mevis")], ["revos"])
    with pytest.raises(InputError, match="not one of"):
        find_data([str(data)], ["kinetics"])


def test_data_in_two_folders_is_refused(tmp_path, data):
    """But a folder may be named twice, and another one lie beside that is not asked for."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "prepared.json").write_bytes((data / "mevis/prepared.json").read_bytes())
    (tmp_path / "again").symlink_to(data / "mevis")
    with pytest.raises(InputError, match=f"mevis_valid_u.* in both {data / 'mevis'} and {copy}"):
        find_data([str(data), str(copy)], ["mevis_valid_u"])
    with pytest.raises(InputError, match="in both"):
        find_data([str(data), str(copy)], ["all"])
    assert find_data([str(data), str(copy)], ["revos"]) == {"revos": data / "revos"}
    assert find_data([str(data / "mevis"), str(data / "mevis"), str(tmp_path / "again")], ["mevis_valid_u"])


# --- submissions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"),
    [("mevis", "d56a6ec78cfa/0/00000.png"), ("ref_youtube_vos", "Annotations/val/0/00000.png")],
)
def test_submissions(tmp_path, data, name, first):
    benchmark, root = BENCHMARKS[name], tmp_path / "p"
    folder = data / benchmark.dataset
    with pytest.raises(InputError, match="truth of .* is not public"):
        score_benchmark(benchmark, folder, tmp_path)
    write_all(data, name, root)
    assert write_submission(benchmark, folder, root, tmp_path / "s.zip") == len(
        check_submission(benchmark, folder, root)[0]
    )
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist()[0] == first
        assert len(archive.namelist()) == sum(len(names) for names in names_of(data, name).values())
        with archive.open(first) as file, Image.open(file) as image:
            assert image.mode == "L" and image.size == (WIDTH, HEIGHT)
    (tmp_path / "folder.zip").mkdir()
    before = set(tmp_path.iterdir())
    for out in (tmp_path / "folder.zip", tmp_path / "nowhere/s.zip", tmp_path / "s.zip/s.zip"):
        with pytest.raises(RunFailure, match=f"cannot write {out}: "):
            write_submission(benchmark, folder, root, out)
    assert set(tmp_path.iterdir()) == before
    bad = root / first.removeprefix("Annotations/")
    Image.new("P", (WIDTH, HEIGHT)).save(bad)
    assert any("grey" in message for message in check_submission(benchmark, folder, root)[1])
    Image.new("L", (WIDTH, HEIGHT), 7).save(bad)
    sorted(bad.parent.iterdir())[1].unlink()
    wrong = check_submission(benchmark, folder, root)[1]
    assert len(wrong) == 2 and "missing" in wrong[1] and "0 and 255" in wrong[0]
    with pytest.raises(InputError, match="no submission can be made.*1 more"):
        write_submission(benchmark, folder, root, tmp_path / "t.zip")
    assert not (tmp_path / "t.zip").exists()
