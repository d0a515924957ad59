"""`revseg filter` with a real sidecar: IoUs against its own masks, decisions that training abides by, resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from child_processes import wait_for

from revseg_jax import filter
from revseg_jax.config import load_config
from revseg_jax.data.clip import boxes_and_areas, decode_mask
from revseg_jax.data.filtered import DECISIONS, write_decisions
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.tracker.process import run_sidecar


@pytest.fixture(scope="module")
def endpoint():
    with run_sidecar(threads=1) as endpoint:
        yield endpoint


@pytest.fixture
def config(endpoint):
    return load_config(None, ["run.dir=.", f"tracker.endpoints=[{endpoint}]"])


def test_filter(tmp_path, capsys, config, endpoint, monkeypatch):
    folder = tmp_path / "clips"
    prepare_synthetic(folder, "easy", 3, 0, seed=6, progress=False)
    source = ClipSource([folder], "train")
    expected: dict[str, list[float]] = {}
    with TrackerClient([endpoint]) as client:  # each mask by itself, IoU by hand
        for clip in (source[i] for i in range(len(source))):
            boxes, _ = boxes_and_areas(clip.masks, clip.height, clip.width)
            for t in np.flatnonzero([rle is not None for rle in clip.masks]):
                mask = client.track([clip.frames[t]], [(0, boxes[t].tolist())])[0, 0]
                truth = decode_mask(clip.masks[t], clip.height, clip.width)
                expected.setdefault(clip.video_id, []).append((mask & truth).sum() / (mask | truth).sum())
    means = {video: float(np.mean(values)) for video, values in expected.items()}
    ordered = sorted(means, key=means.get)
    threshold = (means[ordered[0]] + means[ordered[1]]) / 2

    # Killed in the middle of the third video, after two lines and a half.
    slow = "import sys, time; from revseg_jax import cli, filter; of = filter._mean_iou; scored = []\n"
    slow += "def stopping(clips, *rest):\n    if len(scored) == 2: time.sleep(600)\n"
    slow += "    scored.append(clips); return of(clips, *rest)\n"
    slow += "filter._mean_iou = stopping; cli.main(sys.argv[1:])"
    command = ["filter", str(folder), f"tracker.endpoints=[{endpoint}]"]
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stderr=subprocess.DEVNULL)
    log = folder / filter.SCORES
    wait_for(lambda: (log.exists() and log.read_text().count("\n") == 2) or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "filter.json").exists() and len(ClipSource([folder], "train")) == len(source)
    with open(log, "a") as cut:
        cut.write('{"video": "cut off')
    asked, mean_iou = [json.loads(line)["video"] for line in log.read_text().splitlines()[:2]], filter._mean_iou
    monkeypatch.setattr(
        filter, "_mean_iou", lambda clips, *rest: (asked.append(clips[0].video_id), mean_iou(clips, *rest))[1]
    )
    content = filter.main(str(folder), threshold, config)
    assert sorted(asked) == sorted(means)  # each video once, over both calls
    scores = [json.loads(line) for line in (folder / filter.SCORES).read_text().splitlines()]
    assert {score["video"]: score["mean_iou"] for score in scores} == pytest.approx(means, abs=2e-3)
    assert content["dropped"] == [ordered[0]] and "dropped 1 of 3 videos" in capsys.readouterr().out
    left = ClipSource([folder], "train")
    assert {video for video, _ in left.ids()} == set(ordered[1:])
    assert len(source) - len(left) == content["dropped_queries"]

    kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["video"] != ordered[0]]
    log.write_text("".join(kept))
    assert filter.main(str(folder), threshold, config) == content  # a dropped video without a score is scored too
    assert asked[3:] == ordered[:1]

    assert filter.main(str(folder), 0.0, config)["dropped"] == []  # from the scores that are there
    assert len(asked) == 4 and len(ClipSource([folder], "train")) == len(source)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_bad_threshold(tmp_path, threshold):
    with pytest.raises(InputError, match="between 0 and 1"):
        filter.main(str(tmp_path), threshold, load_config(None, ["run.dir=."]))


def test_scores_of_another_tracker_are_refused(tmp_path, config):
    folder = tmp_path / "clips"
    prepare_synthetic(folder, "easy", 1, 0, seed=6, progress=False)
    record = {"video": "x", "mean_iou": 1.0, "tracker": {"checkpoint": "other.pt", "config": "other.yaml"}}
    (folder / filter.SCORES).write_text(json.dumps(record) + "\n")
    before = {"split": "train", "dropped": ["train-000000"]}
    write_decisions(folder, before)
    with pytest.raises(InputError, match="other.pt"):
        filter.main(str(folder), 0.6, config)
    assert Path(folder / filter.SCORES).exists()
    assert json.loads((folder / DECISIONS).read_text()) == before  # what was decided holds
