"""`revseg demo` with few clips and steps, but real ones: what a stopped one leaves, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from tracker_setup import until

from revseg_jax import demo
from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.run.interruption import Interrupted

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=2", "run.steps=2", "tracker.threads=1"]


@pytest.fixture
def few_clips(monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_CLIPS", 4)
    monkeypatch.setattr(demo, "TEST_CLIPS", 1)


def config_of(folder: Path, *overrides: str):
    return load_config(CONFIG, [f"run.dir={folder}", *SMALL, *overrides])


def evaluations(folder: Path) -> list[str]:
    return [json.loads(line)["label"] for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_a_stopped_demo_has_no_summary_and_the_same_command_goes_on(few_clips, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    assert not demo.was_stopped(tmp_path, config_of(tmp_path))
    with pytest.raises(InputError, match="overlong_tokens=400 must not be above"):
        demo.main(config_of(tmp_path, "rewards.overlong_tokens=400"))
    assert not any(tmp_path.iterdir())

    def stop_after_a_step():
        until(lambda: metrics.exists() and metrics.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_after_a_step)
    stopping.start()
    with pytest.raises(Interrupted, match="step 1 is saved: the same command goes on"):
        demo.main(config_of(tmp_path))
    stopping.join()
    assert evaluations(tmp_path) == ["base"] and not (tmp_path / "summary.json").exists()
    assert capsys.readouterr().out == ""

    with pytest.raises(InputError, match="learning_rate"):
        demo.main(config_of(tmp_path, "learner.learning_rate=0.1"))

    demo.main(config_of(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds_since"] == "the last start"
    assert len(metrics.read_text().splitlines()) == 2 and (tmp_path / "report.html").stat().st_size > 10_000
    assert evaluations(tmp_path)[-1] == "trained" and 0 < summary["trained_jf"] <= 100
    assert capsys.readouterr().out.splitlines()[-1] == json.dumps(summary)

    with pytest.raises(InputError, match="already holds a run"):
        demo.main(config_of(tmp_path))
