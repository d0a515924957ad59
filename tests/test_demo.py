"""`revseg demo` with everything heavy replaced: what it makes of a training that was stopped."""

from __future__ import annotations

import contextlib
import json
import types
from pathlib import Path

import pytest

from revseg_jax import demo
from revseg_jax.config import load_config, to_yaml
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.evaluation.held_out import Evaluation

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
SCORES = Evaluation(96, 30.0, 30.0, 30.0, 1.0, 0.5, 0.1, 0.3, 2.0, 0.4, 0.4, {"motion": 30.0})


@pytest.fixture
def train_to(monkeypatch):
    """A function that sets the step at which the next training ends."""
    steps = []

    def train(config, loaded, client):
        folder = Path(config.run.dir)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        return types.SimpleNamespace(step=steps[-1], trained=None)

    loaded = types.SimpleNamespace(greedy=None, trained=None, frozen=None)
    light = {
        "prepare_synthetic": lambda folder, *_, **__: folder.mkdir(parents=True, exist_ok=True),
        "load_engine": lambda config: loaded,
        "tracker_client": lambda config: contextlib.nullcontext(),
        "evaluate_policy": lambda *_: (SCORES, []),
        "ClipSource": lambda *_: None,
        "write_report": lambda folder: folder / "report.html",
        "train": train,
    }
    for name, stand_in in light.items():
        monkeypatch.setattr(demo, name, stand_in)
    return steps.append


def config_of(folder: Path, *overrides: str):
    return load_config(CONFIG, [f"run.dir={folder}", *overrides])


def test_a_stopped_demo_has_no_summary_and_the_same_command_goes_on(train_to, tmp_path, capsys):
    train_to(7)
    with pytest.raises(RunFailure, match="stopped at step 7 of 100"):
        demo.main(config_of(tmp_path))
    labels = [json.loads(line)["label"] for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert labels == ["base"] and not (tmp_path / "summary.json").exists()
    assert capsys.readouterr().out == ""
    train_to(100)
    demo.main(config_of(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 100 and summary["seconds_since"] == "the last start"


def test_a_demo_does_not_go_on_in_a_finished_or_another_run(train_to, tmp_path):
    train_to(7)
    with pytest.raises(RunFailure):
        demo.main(config_of(tmp_path))
    with pytest.raises(InputError, match="learning_rate"):
        demo.main(config_of(tmp_path, "learner.learning_rate=0.1"))
    train_to(100)
    demo.main(config_of(tmp_path))
    with pytest.raises(InputError, match="already holds a run"):
        demo.main(config_of(tmp_path))


def test_a_new_demo_counts_its_seconds_from_its_start(train_to, tmp_path):
    train_to(100)
    demo.main(config_of(tmp_path / "run"))
    assert "seconds_since" not in json.loads((tmp_path / "run/summary.json").read_text())
