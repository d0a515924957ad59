"""The report: what it says is what the files say, it needs nothing else, and nothing in it can act."""

from __future__ import annotations

import base64
import json
import re
import shutil

import numpy as np
import pytest
from fake_run import BASE, TRAINED, metrics, write_json, write_lines, write_run
from pycocotools import mask as coco
from report_page import Node, Page, filled, read

from revseg_jax.data.frames import encode_frame
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.report import main, write_comparison, write_report
from revseg_jax.report.chains import group_of
from revseg_jax.report.run_files import read_run

ATTACK = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b onclick=alert(3)>"


def records(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "traces" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first try")


@pytest.fixture(scope="module")
def page(folder):
    return read(folder)


@pytest.fixture(scope="module")
def small_original(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "small", steps=0, clips=3)


@pytest.fixture
def small(small_original, tmp_path):
    """Few chains and no curves, which take long to draw; to be changed by a test."""
    return shutil.copytree(small_original, tmp_path / "small")


# ---- What the page says ----------------------------------------------------------------------------------------------


def test_table_has_the_numbers_of_the_evaluations(page):
    table = page.all("table")[0]
    rows = {row.all("th")[0].children[0].strip(): [cell.text for cell in row.all("td")] for row in table.all("tr")[1:]}
    names = {"J": "j", "F": "f", "J&F": "jf", "Format": "format", "Temporal": "temporal", "Spatial": "spatial",
             "Mask": "mask", "Turns": "turns"}  # fmt: skip
    assert list(rows) == list(names)
    for name, key in names.items():
        digits = 1 if key in ("j", "f", "jf") else 2
        assert rows[name][:2] == [f"{BASE[key]:.{digits}f}", f"{TRAINED[key]:.{digits}f}"]
        change = round(TRAINED[key], digits) - round(BASE[key], digits)
        assert float(rows[name][2]) == pytest.approx(change, abs=1e-9)


def test_headline_and_facts(page):
    assert page.all("h1")[0].text == page.all("title")[0].text.split(" · ")[0] == "first try"
    headline = page.all("p", "headline")[0].text
    assert headline == "Reinforcement learning raised held-out J&F from 25.3 to 56.3 (+31.0) on 120 clips."
    facts = {node.all("dt")[0].text: node.all("dd")[0].text for node in page.all("dl", "facts")[0].all("div")}
    assert facts == {"steps": "60", "time": "7 min 17 s", "seed": "7", "ended": "2025-11-22 08:32 UTC",
                     "revision": "0123456789"}  # fmt: skip


def test_a_loss_is_called_a_loss(small):
    halfway = {"label": "trained", **BASE, "jf": 40.0}
    write_lines(small / "evaluation.jsonl", [{"label": "base", **TRAINED}, halfway, {"label": "trained", **BASE}])
    page = read(small)
    assert "lowered held-out J&F from 56.3 to 25.3 (−31.0)" in page.all("p", "headline")[0].text
    assert [cell.attributes["class"] for cell in page.all("td") if cell.text == "−31.0"] == ["worse"]
    verdict = "better than a random visible one, but no better than the best constant keyframe."
    assert verdict in page.text  # the temporal reward of BASE is between the two


def test_kinds_baselines_and_reversed_clips_have_their_bars(page):
    bars = {}
    for chart in page.all("dl", "bars"):
        names = [node.text for node in chart.all("dt")]
        group = names.pop(0) if chart.all("dt", "group") else "temporal"
        lengths = [re.fullmatch(r"width:([\d.]+)%", bar.attributes["style"])[1] for bar in chart.all("span", "bar")]
        values = [node.text.strip() for node in chart.all("dd")]
        bars[group] = {name: (value, float(length)) for name, value, length in zip(names, values, lengths, strict=True)}
    for kind in ("referring", "motion", "reasoning"):
        expected = {"Base": BASE["by_kind"][kind], "Trained": TRAINED["by_kind"][kind]}
        assert bars.pop(kind) == {name: (f"{value:.1f}", value) for name, value in expected.items()}
    expected = {
        "Base": BASE["temporal"],
        "Trained": TRAINED["temporal"],
        "Base, clips reversed": BASE["reversed_temporal"],
        "Trained, clips reversed": TRAINED["reversed_temporal"],
        "Best constant keyframe": TRAINED["best_constant_keyframe"],
        "Random visible keyframe": TRAINED["random_visible_keyframe"],
    }
    assert bars == {"temporal": {k: (f"{v:.2f}", pytest.approx(100 * v, abs=0.06)) for k, v in expected.items()}}


def test_scores_come_from_the_summary_when_there_is_no_evaluation(small):
    (small / "evaluation.jsonl").unlink()
    assert "from 25.3 to 56.3" in read(small).all("p", "headline")[0].text


def test_every_reward_and_every_measure_of_training_has_a_curve(page):
    titles = [node.all("b")[0].text for node in page.all("figure", "curve")]
    paper = ["Format reward", "Temporal reward", "Spatial reward", "Response length", "Total reward", "Turns"]
    expected = [*paper, "Mask reward", "Held-out J&F", "Entropy, nats per token", "KL to the reference",
                "Gradient norm", "Loss", "Clip fraction", "Shares", "Log-prob gap", "Seconds per phase",
                "Tokens per second", "Peak memory, GiB"]  # fmt: skip
    assert titles == expected
    phases = page.all("figure", "curve")[-3]
    assert [key.text for key in phases.all("span", "key")] == ["rollout", "reward wait", "update", "reference", "data"]
    assert "2 slow ones not drawn (compilation), the slowest 45 s" in phases.text


def test_a_resumed_step_counts_once_with_its_later_record(small):
    steps = [{"step": step, "reward/mask": 0.1} for step in (1, 2, 3)] + [{"step": 2, "reward/mask": 0.9}]
    write_lines(small / "metrics.jsonl", steps)
    assert [(r["step"], r["reward/mask"]) for r in read_run(small).metrics] == [(1, 0.1), (2, 0.9), (3, 0.1)]


# ---- Evaluations while the run goes on -------------------------------------------------------------------------------


def test_a_run_that_goes_on_shows_its_last_evaluation_and_how_chains_changed(small):
    base, trained = records(small, "eval_base"), records(small, "eval_trained")
    for name in ("eval_base", "eval_trained"):
        (small / "traces" / f"{name}.jsonl").unlink()
    (small / "summary.json").unlink()
    for step, chains in ((0, base), (20, base), (40, trained)):
        write_lines(small / "traces" / f"eval_{step:06d}.jsonl", chains)
    scores = [{"step": 0, **BASE}, {"step": 20, **BASE}, {"step": 40, **TRAINED}]
    write_lines(small / "evaluation.jsonl", scores)
    page = read(small)
    assert "from 25.3 to 56.3" in page.all("p", "headline")[0].text
    assert len(page.all("article", "clip")[0].all("section", "side")) == 2
    section = next(node for node in page.all("section") if node.attributes.get("aria-labelledby") == "changes")
    for table in section.all("table", "rollouts"):
        assert [row.all("td")[0].text for row in table.all("tr")[1:]] == ["0", "20", "40"]
    said = {(r["video_id"], r["answer1"]) for r in trained}
    shown = section.all("details")[0]
    video = shown.all("small")[0].text.split(" / ")[0]
    last = shown.all("tr")[-1].all("p", "said")[0].text
    assert (video, last) in said


# ---- Several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_compared_in_the_papers_panels(folder, small, tmp_path):
    other = shutil.copytree(small, tmp_path / "runs" / "first try")  # the name of the other one's folder
    write_lines(other / "metrics.jsonl", [{"step": s, "reward/format": 0.5, "rollout/turns": 1.5} for s in (1, 2)])
    for run, rate in ((folder, 0.1), (other, 0.2)):
        config = {"learner": {"learning_rate": rate, "kl": ATTACK}, "run": {"dir": str(run), "seed": 7}}
        write_json(run / "run.json", {**json.loads((run / "run.json").read_text()), "config": config})
    write_lines(other / "evaluation.jsonl", [{"step": 5, **TRAINED, "jf": 80.0}, {"step": 9, **TRAINED}])
    path = write_comparison([folder, other])
    assert path == folder.parent / "comparison.html"
    page = Page(path.read_text(encoding="utf-8")).root
    names = [f"{folder.parent.name}/first try", "runs/first try"]
    results, settings = page.all("table")
    rows = [[cell.text for cell in row.children if isinstance(cell, Node)] for row in results.all("tr")[1:]]
    assert [row[:5] for row in rows] == [
        [names[0], "25.3", "56.3", "56.3", "60"],
        [names[1], "25.3", "56.3", "80.0", "2"],  # the base from its summary
    ]
    rows = [[cell.text for cell in row.children if isinstance(cell, Node)] for row in settings.all("tr")]
    assert rows == [["Field", *names], ["learner.learning_rate", "0.1", "0.2"]]
    figures = {node.all("b")[0].text: node for node in page.all("figure", "curve")}
    assert list(figures)[:6] == [
        "Format reward", "Temporal reward", "Spatial reward", "Response length", "Total reward", "Turns"
    ]  # fmt: skip
    for title, there in (("Format reward", names), ("Turns", names), ("Temporal reward", names[:1])):
        assert [key.text for key in figures[title].all("span", "key")] == there
    _check_inert(page)


def test_a_run_is_not_compared_with_itself(small):
    with pytest.raises(InputError, match="given twice"):
        write_comparison([small, small / ".." / small.name])


# ---- Chains ----------------------------------------------------------------------------------------------------------


def test_chains_stand_side_by_side_with_what_was_said(folder, page):
    by_label = {
        label: {record["query"] + record["video_id"]: record for record in records(folder, f"eval_{label}")}
        for label in ("base", "trained")
    }
    assert len(page.all("article", "clip")) >= 4
    for clip in page.all("article", "clip"):
        query = clip.all("h3")[0].text.strip("“”")
        video = clip.all("p", "ids")[0].text.split(" / ")[0]
        sides = clip.all("section", "side")
        assert [side.all("span", "policy")[0].text for side in sides] == ["Base", "Trained"]
        for side, label in zip(sides, by_label, strict=True):
            record = by_label[label][query + video]
            said = [node.text for node in side.all("p", "said")]
            assert said == [text for text in (record["answer1"], record["answer2"]) if text is not None]
            assert side.all("span", "jf")[0].text == f"J&F {50 * (record['j'] + record['f']):.1f}"
            assert [node.text for node in side.all("p", "failure")] == (
                [f"Failed. {record['failure']}"] if record["failure"] else []
            )
            rewards = side.all("dl", "rewards")[0]
            values = {node.all("dt")[0].text: node.all("dd")[0].text for node in rewards.all("div")}
            assert values == {name: f"{value:.2f}" for name, value in record["reward"].items()}
            keys = [item.text.split()[0] for item in side.all("li", "is-key")]
            assert keys == ([str(record["frame"])] if record["frame"] is not None else [])


def test_masks_box_and_frames_are_those_of_the_trace(folder, page):
    trained = {record["query"] + record["video_id"]: record for record in records(folder, "eval_trained")}
    compared = 0
    for clip in page.all("article", "clip"):
        record = trained[clip.all("h3")[0].text.strip("“”") + clip.all("p", "ids")[0].text.split(" / ")[0]]
        store = {image.attributes["id"]: image.attributes["href"] for image in clip.all("image")}
        side = clip.all("section", "side")[1]
        strip = side.all("ol", "strip")[0].all("svg")
        assert len(strip) == len(record["thumbs"])
        for svg, thumb in zip(strip, record["thumbs"], strict=True):
            for name in ("mask", "truth"):
                drawn = svg.all("path", name)
                expected = coco.decode(thumb[name]).astype(bool) if thumb[name] else np.zeros((128, 128), bool)
                shape = filled(drawn[0].attributes["d"], 128, 128) if drawn else np.zeros((128, 128), bool)
                np.testing.assert_array_equal(shape, expected)
                compared += expected.any()
            uri = store[svg.all("use")[0].attributes["href"].removeprefix("#")]
            assert base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))[:3] == b"\xff\xd8\xff"
        if record["box"]:
            box = side.all("rect", "box")[0].attributes
            x, y, width, height = (float(box[key]) for key in ("x", "y", "width", "height"))
            assert (x, y, x + width, y + height) == pytest.approx(record["box"], abs=0.11)
    assert compared > 20


def test_boxes_are_scaled_with_the_picture(small):
    chain = records(small, "eval_trained")[0]
    frame = np.zeros((480, 960, 3), np.uint8)
    thumb = {"t": 5, "jpeg": base64.b64encode(encode_frame(frame)).decode(), "mask": None, "truth": None}
    chain |= {"size": [480, 960], "frame": 5, "box": [96.0, 48.0, 480.0, 240.0], "thumbs": [thumb]}
    write_lines(small / "traces" / "eval_trained.jsonl", [chain])
    (small / "traces" / "eval_base.jsonl").unlink()
    box = read(small).all("rect", "box")[0].attributes
    assert [float(box[key]) for key in ("x", "y", "width", "height")] == [24, 12, 96, 48]


def test_one_policy_alone_can_be_read(small):
    (small / "traces" / "eval_trained.jsonl").unlink()
    clips = read(small).all("article", "clip")
    assert clips and all(len(clip.all("section", "side")) == 1 for clip in clips)


def test_groups_show_the_one_that_differs_most(folder, page):
    last = records(folder, "step_000060")
    group = group_of(last)
    assert len(group) == 4 and len({record["video_id"] for record in group}) == 1
    totals = [record["reward"]["total"] for record in group]
    other = [record["reward"]["total"] for record in last if record["video_id"] != group[0]["video_id"]]
    assert totals == sorted(totals, reverse=True) and np.std(totals) >= np.std(other)
    tables = page.all("table", "rollouts")
    assert len(tables) == 2  # first and last step
    assert [row.all("td")[0].text for row in tables[1].all("tr")[1:]] == [f"{total:.2f}" for total in totals]


def test_placeholders_of_pictures_are_counted(page):
    prompts = [node.text for node in page.all("section", "side")[0].all("pre")]
    assert "<|video_pad|>×64" in prompts[0] and "<|video_pad|><|video_pad|>" not in prompts[0]


# ---- Safe and self-contained -----------------------------------------------------------------------------------------


def _check_inert(page: Node) -> None:
    for node in page.all():
        assert node.tag not in ("script", "iframe", "object", "embed", "link", "base", "img", "form", "foreignobject")
        for name, value in node.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "data", "action", "srcdoc")
            if "href" in name:
                assert value.startswith(("#", "data:image/jpeg;base64,"))
            assert "url(" not in (value or "") or re.fullmatch(r"url\(#\w+\)", value)
    styles = "".join(node.text for node in page.all("style"))
    assert "@import" not in styles and set(re.findall(r"url\((.)", styles)) == {"#"}


def test_the_page_needs_nothing_else(folder, page):
    _check_inert(page)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w+\.", text)
    policy = next(node for node in page.all("meta") if node.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy.attributes["content"]


def test_nothing_a_run_says_can_act(tmp_path):
    folder = write_run(tmp_path / "<b onclick=x>&run", steps=1, clips=2)
    for name in ("eval_base", "eval_trained", "step_000001"):
        chains = records(folder, name)
        for chain in chains:
            for key in ("query", "kind", "video_id", "expression_id", "failure", "prompt1", "answer1", "answer2"):
                chain[key] = key + ATTACK
        write_lines(folder / "traces" / f"{name}.jsonl", chains)
    (folder / "config.yaml").write_text(f"config: {ATTACK}")
    write_json(folder / "run.json", {"seed": ATTACK, "git": {"revision": ATTACK}, ATTACK: ATTACK})
    evaluation = {**TRAINED, "by_kind": {f"kind {ATTACK} $x_$": 50.0}}
    write_lines(folder / "evaluation.jsonl", [{"label": label, **evaluation} for label in ("base", "trained")])
    page = read(folder)
    _check_inert(page)
    for key in ("query", "kind", "video_id", "failure", "prompt1", "answer1", "answer2", "config: ", "kind "):
        assert key + ATTACK in page.text
    assert page.all("h1")[0].text == "<b onclick=x>&run"


def test_texts_that_are_no_unicode_do_not_stop_the_report(small):
    chain = records(small, "eval_base")[0] | {"answer1": "half \ud800 a pair"}
    write_lines(small / "traces" / "eval_base.jsonl", [chain])
    (small / "traces" / "eval_trained.jsonl").unlink()
    assert "half ? a pair" in read(small).text


def test_a_long_run_on_large_frames_stays_small(tmp_path):
    folder = write_run(tmp_path / "large", steps=0, clips=8)
    rng = np.random.default_rng(1)
    noise = np.asarray(rng.integers(0, 255, (90, 160, 3)), np.uint8).repeat(6, 0).repeat(6, 1)
    jpeg = base64.b64encode(encode_frame(noise)).decode()
    for name in ("eval_base", "eval_trained"):
        chains = records(folder, name)
        for chain in chains:
            chain["answer1"] = "<think>" + "and then it moves on " * 5000
            for thumb in chain["thumbs"]:
                thumb["jpeg"] = jpeg
        write_lines(folder / "traces" / f"{name}.jsonl", chains)
    write_lines(folder / "metrics.jsonl", [metrics(step, 5000, rng) for step in range(1, 5001)])
    assert write_report(folder).stat().st_size < 3e6


def test_names_are_unique_and_references_find_them(page):
    names = [node.attributes["id"] for node in page.all() if node.attributes.get("id")]
    assert len(names) == len(set(names))
    for node in page.all():
        for name, value in node.attributes.items():
            if value and ((name.endswith("href") and value[0] == "#") or value.startswith("url(#")):
                assert value.removeprefix("url(").strip("#)") in names
            if name == "aria-labelledby":
                assert value in names


def test_pictures_and_tables_can_be_heard(page):
    assert page.all("html")[0].attributes["lang"] == "en"
    for svg in page.all("svg"):
        hidden = svg.attributes.get("aria-hidden") == "true"
        assert hidden or (svg.attributes["role"] == "img" and svg.attributes["aria-label"])
    for figure in page.all("figure"):
        assert "→" in figure.all("figcaption")[0].text  # in words, what the hidden drawing shows
    assert all(head.attributes.get("scope") for head in page.all("th"))


# ---- Files that are missing or damaged -------------------------------------------------------------------------------

OPTIONAL = ("config.yaml", "run.json", "metrics.jsonl", "evaluation.jsonl", "summary.json", "traces/eval_base.jsonl",
            "traces/eval_trained.jsonl", "traces/step_000001.jsonl")  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_file_may_be_missing(small, name):
    (small / name).unlink()
    assert read(small).all("h1")[0].text == "small"


def test_a_run_that_just_began(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    page = read(tmp_path)
    assert page.all("p", "headline")[0].text == "Nothing was measured yet."
    assert not page.all("table") and not page.all("article") and "run: {}" in page.text


@pytest.mark.parametrize("make", [False, True])
def test_no_run_is_one_line(tmp_path, make):
    folder = tmp_path / "missing"
    if make:
        folder.mkdir()
    with pytest.raises(InputError) as error:
        write_report(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not make or not list(folder.iterdir())


def test_a_line_that_is_still_being_written_is_left_out(small):
    with open(small / "evaluation.jsonl", "a") as file:
        file.write('{"label": "trained", "jf": 99')
    assert "to 56.3" in read(small).all("p", "headline")[0].text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', "line 2"),
        ("evaluation.jsonl", b"[1]\n", "line 1"),
        ("summary.json", b"{", "summary.json"),
        ("run.json", b"\xff\xfe", "UTF-8"),
    ],
)
def test_damaged_files_are_named(small, name, content, message):
    (small / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        write_report(small)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (small / "report.html").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"jpeg": "no base64!"},
        {"jpeg": base64.b64encode(b"no picture").decode()},
        {"mask": {"size": [128, 128], "counts": "0"}},
        {"mask": {"size": [128, 128]}},
        {"t": None},
    ],
)
def test_damaged_pictures_are_one_line(small, damage):
    chains = records(small, "eval_trained")
    for chain in chains:
        chain["thumbs"][0] |= damage
    write_lines(small / "traces" / "eval_trained.jsonl", chains)
    with pytest.raises(InputError) as error:
        write_report(small)
    assert "traces of run small" in str(error.value) and "\n" not in str(error.value)


def test_an_old_report_stays_until_the_new_one_is_complete(small, monkeypatch):
    path = small / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(RunFailure, match="No space left on device"):
            write_report(small)
    assert path.read_text() == "old" and not list(small.glob(".*"))
    write_report(small)
    assert path.read_text() != "old" and not list(small.glob(".*"))


def test_main_prints_the_path(small, capsys):
    main([str(small)])
    assert capsys.readouterr().out == f"{small / 'report.html'}\n"
