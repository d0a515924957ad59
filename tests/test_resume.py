"""A run is a function of its config, seed and data, however often it was stopped; two never share a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from revseg_jax import train, verify
from revseg_jax.config import load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.rollout.loading import load_engine

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
# No tracker: the sidecar's part in a stopped run is tested with the sidecar.
SMALL = ["rollout.prompts_per_step=1", "rollout.group_size=2", "rewards.mask=0", "run.traces_every=1"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    prepare_synthetic(folder, "easy", 4, 2, seed=3, progress=False)
    return folder


def overrides(clips, folder, steps, *extra):
    return [*SMALL, f"data.train=[{clips}]", f"run.dir={folder}", f"run.steps={steps}", *extra]


def run(*arguments):
    config = load_config(CONFIG, overrides(*arguments))
    return train.train(config, load_engine(config), None)


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run(clips, folder, 4, "run.checkpoint_every=1")


def digests(folder):
    return [json.loads(line) for line in (folder / "digests.jsonl").read_text().splitlines()]


def assert_same_parameters(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(straight, clips, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    newest = folder / "checkpoints" / "4"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    state = run(clips, folder, 4, "run.checkpoint_every=1")
    assert "damaged" in capsys.readouterr().err and (folder / "damaged" / "4").is_dir()
    assert_same_parameters(straight[1], state)
    assert digests(folder) == digests(straight[0])


def test_sidecars_may_move_between_a_run_and_its_continuation(straight, clips, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    state = run(clips, folder, 4, "run.checkpoint_every=2", "tracker.endpoints=[a:1,b:2]", "tracker.patience=5")
    assert_same_parameters(straight[1], state)
    with pytest.raises(InputError, match="rollout.group_size: 2 -> 3"):
        run(clips, folder, 4, "rollout.group_size=3")


def test_without_any_sound_checkpoint_the_run_stops_in_one_line(straight, clips, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    with pytest.raises(RunFailure, match="no checkpoint"):
        run(clips, folder, 5)


def test_verify_repeats_the_first_steps_and_names_the_first_difference(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    verify.main(str(folder), 1)
    assert "1 steps repeat" in capsys.readouterr().out
    rows = digests(folder)
    rows[0]["rewards"] = "0" * 16
    (folder / "digests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFailure, match="step 1, rewards"):
        verify.main(str(folder), 1)
    with pytest.raises(InputError, match="digests.jsonl"):
        verify.main(str(tmp_path), 1)


@pytest.fixture(scope="module")
def command(clips):
    def start(folder, steps, *extra):
        arguments = overrides(clips, folder, steps, *extra)
        command = [sys.executable, "-m", "revseg_jax.cli", "train", "--config", str(CONFIG), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def wait_for(condition, process, seconds=300):
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


def test_kill_and_sigterm_change_nothing(straight, clips, command, tmp_path):
    """Killed after a checkpoint, then told to stop, then finished: as if nothing had happened."""
    folder = tmp_path / "run"
    killed = command(folder, 4, "run.checkpoint_every=1")
    wait_for(lambda: (folder / "checkpoints" / "1").is_dir(), killed)
    killed.kill()
    killed.communicate()

    ended = command(folder, 4, "run.checkpoint_every=100")
    before = len(digests(folder))
    wait_for(lambda: (folder / "digests.jsonl").exists() and len(digests(folder)) != before, ended)
    with pytest.raises(InputError, match="another process"):
        run(clips, folder, 4)
    ended.send_signal(signal.SIGTERM)
    _, words = ended.communicate(timeout=300)
    assert ended.returncode == 0, words

    state = run(clips, folder, 4, "run.checkpoint_every=1")
    assert_same_parameters(straight[1], state)
    assert digests(folder) == digests(straight[0])
    traces = sorted(path.name for path in (folder / "traces").glob("*.jsonl"))
    assert traces == sorted(path.name for path in (straight[0] / "traces").glob("*.jsonl"))
