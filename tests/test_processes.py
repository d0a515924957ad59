"""The same training on one device, on eight, and in two processes; and how the processes end together.

Every run is the command itself, with clips, a sidecar, checkpoints and logs.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.tracker.process import run_sidecar

ROOT = Path(__file__).parents[1]
STEPS = 2


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """What all runs have in common: 8 prompts a step, so that 8 devices have one each."""
    clips = tmp_path_factory.mktemp("data") / "clips"
    prepare_synthetic(clips, "easy", 6, 2, seed=5, progress=False)
    with run_sidecar(threads=1) as endpoint:
        yield [
            *("rollout.prompts_per_step=8", "rollout.group_size=2", "learner.freeze_vision=false"),
            *("run.traces_every=1", f"run.checkpoint_every={STEPS}"),
            *(f"data.train=[{clips}]", f"tracker.endpoints=[{endpoint}]"),
            *(f"data.test=[{clips}]", "data.test_clips=5", f"run.evaluate_every={STEPS}"),
        ]


def start(overrides, folder, devices, *extra, environment=()):
    command = [sys.executable, "-m", "revseg_jax.cli", "train", "--config", "configs/demo.yaml", *overrides]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, f"run.dir={folder}", *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | flags | dict(environment),
    )


def start_two(overrides, folder, steps, *mesh):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"REVSEG_COORDINATOR": address, "REVSEG_PROCESS_COUNT": "2"}
    return [
        start(overrides, folder, 4, f"run.steps={steps}", *mesh, environment=shared | {"REVSEG_PROCESS_ID": str(index)})
        for index in range(2)
    ]


def finish(process):
    out, words = process.communicate()
    assert process.returncode == 0, words[-3000:]
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_state(folder):
    """Parameters and optimiser by their paths, as NumPy."""
    path = (folder / "checkpoints" / str(STEPS) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(path, restore_args=plain)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_training(folder, alone):
    """The same answers and rewards, losses and parameters up to float32 rounding."""
    for step in range(1, STEPS + 1):
        name = f"traces/step_{step:06d}.jsonl"
        ours, theirs = (lines(path / name) for path in (folder, alone))
        assert len(ours) == 16
        for a, b in zip(ours, theirs, strict=True):
            assert (a["video_id"], a["query"], a["answer1"], a["answer2"]) == (
                *(b["video_id"], b["query"], b["answer1"], b["answer2"]),
            )
            assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)
    for a, b in zip(lines(folder / "metrics.jsonl")[:STEPS], lines(alone / "metrics.jsonl"), strict=True):
        # The largest gap between sampler and trainer is itself rounding, so each has the bound of any run, and no run
        # has another's.
        assert max(a["rollout/logprob_gap"], b["rollout/logprob_gap"]) < 1e-4
        for name in b.keys() - {"rollout/logprob_gap", "reward/wait_fraction"}:
            if name.startswith(("learner/", "reward/", "rollout/")):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    for ours, theirs in zip(*(lines(path / "evaluation.jsonl") for path in (folder, alone)), strict=False):
        assert ours.pop("by_kind") == pytest.approx(theirs.pop("by_kind"), rel=1e-4)
        assert ours == pytest.approx(theirs, rel=1e-4) and ours["clips"] == 5
    assert [line["step"] for line in lines(folder / "evaluation.jsonl")[:2]] == [0, STEPS]
    ours, theirs = saved_state(folder), saved_state(alone)
    assert ours.keys() == theirs.keys()
    moved, differences = [], []
    for name, expected in theirs.items():
        if ".mu" in name or "'mu'" in name:  # the gradients, averaged
            np.testing.assert_allclose(ours[name], expected, atol=1e-5, err_msg=name)
            moved.append(np.abs(expected).max())
        elif name.startswith(("['trained']", ".trained")):
            differences.append(np.abs(ours[name] - expected).ravel())
    assert max(moved) > 1e-3
    # Adam makes whole steps, of any sign, of gradients that are rounding noise.
    assert np.mean(np.concatenate(differences) > 1e-5) < 1e-4


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    out = finish(start(overrides, folder, 1, f"run.steps={STEPS}"))
    assert re.search(r"step 2 of 2, digest of the parameters [0-9a-f]{16}", out)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_eight_devices_train_as_one_does(sizes, alone, overrides, tmp_path):
    mesh = [f"mesh.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    finish(start(overrides, tmp_path / "run", 8, f"run.steps={STEPS}", *mesh))
    assert_same_training(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_end_together(alone, overrides, tmp_path):
    """Each has half of the prompts; only the first writes. Then one is killed, and the other does not wait for it.

    From their checkpoint one process goes on as if it had been alone from the start.
    """
    folder = tmp_path / "run"
    processes = start_two(
        overrides, folder, 1000, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "run.keep_checkpoints=99"
    )
    try:
        while not ((folder / "checkpoints" / str(STEPS)).is_dir() and len(lines(folder / "metrics.jsonl")) > STEPS):
            for process in processes:
                assert process.poll() is None, [p.communicate()[1][-3000:] for p in processes]
            time.sleep(0.1)
        assert_same_training(folder, alone)
        processes[1].kill()
        killed = time.monotonic()
        _, words = processes[0].communicate(timeout=60)
        assert processes[0].returncode not in (0, None), words
        print(f"ended {time.monotonic() - killed:.1f} s after the other was killed: {words[-500:]}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    more = f"run.steps={len(lines(folder / 'metrics.jsonl')) + 1}"
    finish(start(overrides, folder, 1, more))
    shutil.copytree(alone, tmp_path / "alone")
    finish(start(overrides, tmp_path / "alone", 1, more))
    for ours, theirs in zip(*(lines(path / "digests.jsonl") for path in (folder, tmp_path / "alone")), strict=True):
        for name in ("step", "data", "tokens", "rewards"):
            assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_two_processes_leave_a_bad_batch(overrides, tmp_path):
    """Of PPO, whose rewards are spread over the devices of both: the first one's own."""
    options = ("learner.algorithm=ppo", "learner.ppo.critic=head", "learner.learning_rate=1e30")
    without = ("learner.max_bad_steps=1", "run.evaluate_every=0", "rewards.mask=0")
    ended = [process.communicate()[1] for process in start_two([*overrides, *options, *without], tmp_path / "run", 3)]
    assert all("steps in a row had a loss or gradient that is not finite" in words for words in ended), ended
    (path,) = (tmp_path / "run").glob("bad_batch_*.npz")
    assert np.load(path)["rewards"].shape == (4, 2, 2)


@pytest.mark.slow
def test_two_processes_that_share_all_prompts_train_as_one_does(alone, overrides, tmp_path):
    """The tensor axis lies across both: each has copies of all rows, and every row counts once.

    Gloo gives up now and then, as two collectives that do not depend on each other met in another order in the other
    process (with the same arrays in both): XLA on CPUs does not wait for the one before it begins the other.
    """
    for attempt in range(4):
        folder = tmp_path / f"run_{attempt}"
        processes = start_two(overrides, folder, STEPS, "mesh.fsdp=1", "mesh.tensor=8")
        words = [process.communicate()[1] for process in processes]
        if not any("gloo::EnforceNotMet" in of_one for of_one in words):
            break
    assert [process.returncode for process in processes] == [0, 0], words
    assert_same_training(folder, alone)
