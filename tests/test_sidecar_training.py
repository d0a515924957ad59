"""Training while its sidecar dies: back in time, nothing is different; away too long, the run can go on later."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from child_processes import run_two
from safetensors.torch import load_file, save_file
from tracker_setup import start_sidecar

from revseg_jax import train
from revseg_jax.config import load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.rollout.loading import load_engine
from revseg_jax.tracker import SidecarAway, TrackerClient, connection
from revseg_jax.tracker.model import EMBEDDED

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=3", "rollout.prompts_per_batch=1", "run.traces_every=1"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    prepare_synthetic(folder, "easy", 4, 2, seed=3, progress=False)
    return folder


@pytest.fixture
def sidecar():
    """[process, port] of a sidecar that a test may kill and replace."""
    held = [*start_sidecar(Path("embedded"), Path("embedded"))]
    yield held
    held[0].kill()
    held[0].wait()


@pytest.fixture
def other_checkpoint(tmp_path) -> Path:
    """The embedded tracker, but for one weight."""
    tensors = load_file(EMBEDDED / "tracker.safetensors")
    tensors["no_mem_embed"][0, 0, 0] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    shutil.copy(EMBEDDED / "tracker.yaml", tmp_path / "other.yaml")
    return tmp_path / "other.safetensors"


class KillingClient(TrackerClient):
    """Kills its sidecar just before request number `at`; one with the checkpoint `back` takes its place."""

    def __init__(self, sidecar, at: int, back: Path | None, patience: float):
        super().__init__([f"127.0.0.1:{sidecar[1]}"], patience_seconds=patience)
        self.sidecar, self.at, self.back, self.requests = sidecar, at, back, 0

    def score_async(self, *arguments, **options):
        if self.requests == self.at:
            self.sidecar[0].kill()
            self.sidecar[0].wait()
            if self.back:
                self.starting = threading.Thread(target=self.start_again)
                self.starting.start()
        self.requests += 1
        return super().score_async(*arguments, **options)

    def start_again(self) -> None:
        self.sidecar[0], _ = start_sidecar(self.back, Path("embedded"), self.sidecar[1])


def run(clips, client, folder, steps=2):
    overrides = [*SMALL, f"data.train=[{clips}]", f"run.dir={folder}", f"run.steps={steps}"]
    config = load_config(CONFIG, overrides)
    return train.train(config, load_engine(config), client)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["reward/wait_fraction"] < 1 for row in rows)
    timed = ("time", "seconds/", "speed/", "memory/", "reward/wait_fraction", "data/wait_fraction")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def test_a_sidecar_that_dies_changes_nothing(clips, sidecar, other_checkpoint, tmp_path):
    with TrackerClient([f"127.0.0.1:{sidecar[1]}"]) as client:
        state = run(clips, client, tmp_path / "straight")
    expected = metrics(tmp_path / "straight")
    assert len(expected) == 2 and any(row["reward/mask"] > 0 for row in expected)
    # Killed in the second step, and started again while the step waits for its rewards.
    with KillingClient(sidecar, at=2, back=Path("embedded"), patience=300) as client:
        again = run(clips, client, tmp_path / "killed")
        assert client.requests > 2
        client.starting.join()
    assert metrics(tmp_path / "killed") == expected
    jax.tree.map(np.testing.assert_array_equal, again.trained, state.trained)
    # Killed for good.
    folder = tmp_path / "stopped"
    with KillingClient(sidecar, at=2, back=None, patience=0.5) as client:
        with pytest.raises(RunFailure, match=r"no tracker sidecar answers at .*; step 1 is saved, .* goes on") as error:
            run(clips, client, folder)
    assert "\n" not in str(error.value) and len(metrics(folder)) == 1
    # Another model took its place.
    sidecar[0], _ = start_sidecar(other_checkpoint, Path("embedded"), sidecar[1])
    with TrackerClient([f"127.0.0.1:{sidecar[1]}"]) as client:
        with pytest.raises(InputError, match=f"another tracker .embedded and {other_checkpoint}.: choose another"):
            run(clips, client, folder)
    sidecar[0].kill()
    sidecar[0].wait()
    sidecar[0], _ = start_sidecar(Path("embedded"), Path("embedded"), sidecar[1])
    with TrackerClient([f"127.0.0.1:{sidecar[1]}"]) as client:
        resumed = run(clips, client, folder)
    assert metrics(folder) == expected
    jax.tree.map(np.testing.assert_array_equal, resumed.trained, state.trained)
    first, last = (json.loads((folder / "run.json").read_text())[key] for key in ("earlier_starts", "tracker"))
    assert [start["tracker"] for start in first] == [last] and last["checkpoint"] == "embedded"


def test_a_sidecar_that_comes_back_with_another_model_scores_nothing(clips, sidecar, other_checkpoint, tmp_path):
    with KillingClient(sidecar, at=2, back=other_checkpoint, patience=300) as client:
        with pytest.raises(RunFailure, match=r"runs another model than the first .*; step 1 is saved"):
            run(clips, client, tmp_path / "run")
        client.starting.join()
    assert len(metrics(tmp_path / "run")) == 1


def test_a_run_waits_for_sidecars_that_are_started_with_it(clips, sidecar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(connection, "FIRST_CONTACT_SECONDS", 0.1)
    sidecar[0].kill()
    sidecar[0].wait()
    with TrackerClient([f"127.0.0.1:{sidecar[1]}"]) as client:
        with pytest.raises(SidecarAway, match="no tracker sidecar answers"):
            train.await_tracker(client, 0.2)
        starting = threading.Thread(target=lambda: sidecar.append(start_sidecar(*[Path("embedded")] * 2, sidecar[1])))
        starting.start()
        known = train.await_tracker(client, 300)
        starting.join()
        sidecar[0] = sidecar.pop()[0]
    assert known["tracker"]["checkpoint"] == "embedded" and known["tracker_device"] == "cpu"
    assert capsys.readouterr().err.count("waiting for up to 300 s") == 1


ASK = """
import sys
from revseg_jax.parallel.processes import failing_together
from revseg_jax.parallel.startup import start_processes
from revseg_jax.tracker import TrackerClient
from revseg_jax.train import await_tracker

start_processes()
with failing_together(), TrackerClient([sys.argv[2 + int(sys.argv[1])]]) as client:
    await_tracker(client, 0)
"""


def test_processes_that_ask_different_trackers_do_not_start(sidecar, other_checkpoint):
    other, port = start_sidecar(other_checkpoint, Path("embedded"))
    ports = sidecar[1], port
    try:
        ended = run_two(ASK, *(f"127.0.0.1:{port}" for port in ports))
    finally:
        other.kill()
        other.wait()
    for _, errors, status in ended:
        assert status == 2, errors[-3000:]
        assert f"process 1 asks another tracker than process 0 ({other_checkpoint} and embedded): give all" in errors
