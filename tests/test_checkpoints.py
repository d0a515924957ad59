"""Which checkpoints stay, and what a disk that refuses does to them."""

import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax.errors import RunFailure
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest

NOISE = np.random.default_rng(0).normal(size=300_000)  # does not compress
STATE = {"kernel": jnp.asarray(NOISE, jnp.float32), "step": jnp.int32(0)}  # 1.2 MB


def steps_of(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


def test_the_newest_and_the_best_stay(tmp_path):
    scores = {}
    checkpoints = Checkpoints(tmp_path, NewestAndBest(2, 1, scores))
    for step, score in enumerate([10.0, 50.0, 30.0, None, 50.0, 20.0, 10.0], start=1):
        checkpoints.save(step, {"step": jnp.int32(step)}, {"at": step})
        if score is not None:
            scores[step] = score  # as in training: the evaluation comes after the checkpoint
    checkpoints.close()
    assert steps_of(tmp_path) == ["5", "6", "7"]  # 5 is as good as 2 and later
    again = Checkpoints(tmp_path, NewestAndBest(1, 2, scores))
    again.save(8, {"step": jnp.int32(8)}, {"at": 8})
    again.close()
    assert steps_of(tmp_path) == ["5", "6", "8"]


def test_without_scores_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, NewestAndBest(2, 1, {}))
    for step in range(1, 5):
        checkpoints.save(step, {"step": jnp.int32(step)}, {"at": step})
    checkpoints.close()
    assert steps_of(tmp_path) == ["3", "4"]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, NewestAndBest(2, 0, {}))
    assert checkpoints.latest_step() is None
    checkpoints.save(7, STATE, {"at": 7})
    checkpoints.close()
    assert steps_of(tmp_path) == ["7"]


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    free = os.statvfs(folder)
    (folder / "filling").write_bytes(bytes(free.f_bavail * free.f_bsize - left))


@pytest.mark.parametrize("refusal", ["full", "full to the last byte", "read-only"])
def test_a_disk_that_refuses_is_one_line_and_the_previous_checkpoint_intact(small_disk, refusal, capfd):
    folder = small_disk / "checkpoints"
    checkpoints = Checkpoints(folder, NewestAndBest(2, 0, {}))
    checkpoints.save(1, STATE | {"step": jnp.int32(1)}, {"at": 1})
    checkpoints._manager.wait_until_finished()
    if refusal == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    else:
        fill(small_disk, left=200_000 if refusal == "full" else 0)
    reason = "Read-only file system" if refusal == "read-only" else "No space left on device"
    with pytest.raises(RunFailure, match=f"{folder}: {reason}.*previous one is intact") as error:
        checkpoints.save(2, STATE | {"step": jnp.int32(2)}, {"at": 2})
        checkpoints.close()  # what was written in the background is heard of here
    assert "\n" not in str(error.value)
    assert refusal == "read-only" or "Traceback" not in capfd.readouterr().err
    assert steps_of(folder) == ["1"]
    if refusal == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    else:
        (small_disk / "filling").unlink()
    step, state, data = Checkpoints(folder, NewestAndBest(2, 0, {})).restore(STATE)
    assert (step, int(state["step"]), data) == (1, 1, {"at": 1})
    np.testing.assert_array_equal(state["kernel"], STATE["kernel"])
