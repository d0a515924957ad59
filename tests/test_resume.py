"""A run is a function of its config, seed and data, however often it was stopped; two never share a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.resume import differences, examples_used, kill_at_random, training
from revseg_jax import train, verify
from revseg_jax.config import load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.rollout.loading import load_engine
from revseg_jax.run.folder import RunFolder, read_records
from revseg_jax.run.interruption import Interrupted, heed_sigterm
from revseg_jax.run.manifest import policy_fingerprint

STEPS = 8
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
    return folder, run(clips, folder, STEPS, "run.checkpoint_every=1")


def digests(folder):
    return [json.loads(line) for line in (folder / "digests.jsonl").read_text().splitlines()]


def assert_same_parameters(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(straight, clips, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    newest = folder / "checkpoints" / str(STEPS)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    state = run(clips, folder, STEPS, "run.checkpoint_every=1")
    assert "damaged" in capsys.readouterr().err and (folder / "damaged" / str(STEPS)).is_dir()
    assert_same_parameters(straight[1], state)
    assert digests(folder) == digests(straight[0])


def test_sidecars_may_move_between_a_run_and_its_continuation(straight, clips, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    state = run(clips, folder, STEPS, "run.checkpoint_every=2", "tracker.endpoints=[a:1,b:2]", "tracker.patience=5")
    assert_same_parameters(straight[1], state)
    with pytest.raises(InputError, match="rollout.group_size: 2 -> 3"):
        run(clips, folder, STEPS, "rollout.group_size=3")
    starts = json.loads((folder / "run.json").read_text())["earlier_starts"]
    assert [start["command"] for start in starts] == [sys.argv]


def test_a_run_does_not_go_on_with_other_data(straight, clips, tmp_path):
    folder, others = tmp_path / "run", tmp_path / "clips"
    shutil.copytree(straight[0], folder)
    prepare_synthetic(others, "easy", 4, 2, seed=4, progress=False)
    with pytest.raises(InputError, match="other clips in data.train"):
        run(others, folder, STEPS)
    shutil.copytree(clips, tmp_path / "moved")
    run(tmp_path / "moved", folder, STEPS)  # the same ones may lie elsewhere


def test_a_run_does_not_go_on_from_another_start_policy(straight, clips, tmp_path):
    folder, policy = tmp_path / "run", tmp_path / "policy"
    shutil.copytree(straight[0], folder)
    shutil.copytree(load_engine(load_config(CONFIG, ["run.dir=none"])).folder, policy)
    manifest = json.loads((folder / "run.json").read_text())
    assert policy_fingerprint(policy) == manifest["policy_fingerprint"]
    weights = next(policy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "run.json").write_text(json.dumps(manifest | {"policy_fingerprint": policy_fingerprint(policy)}))
    with pytest.raises(InputError, match="other files in policy.path"):
        run(clips, folder, STEPS)


def test_steps_that_are_not_finite_stop_the_run_with_their_batch(clips, tmp_path):
    """The first update is finite and throws the parameters far away: nothing after it is."""
    folder, options = tmp_path / "run", ["learner.learning_rate=1e30", "learner.max_bad_steps=2"]
    with pytest.raises(RunFailure, match="2 steps in a row .* step 3 is saved") as error:
        run(clips, folder, STEPS, *options)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["learner/bad_steps"] for row in rows] == [0, 1, 2]
    assert rows[0]["learner/loss"] is not None and rows[2]["learner/loss"] is None  # JSON has no NaN
    batch = np.load(folder / "bad_batch_000003.npz")
    assert str(folder / "bad_batch_000003.npz") in str(error.value)
    assert batch["tokens"].shape[:2] == (1, 2) and batch["rewards"].shape == (1, 2, 2)
    with pytest.raises(RunFailure, match="3 steps in a row .* step 4 is saved"):
        run(clips, folder, STEPS, *options)


def test_without_any_sound_checkpoint_the_run_stops_in_one_line(straight, clips, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    before = digests(folder), sorted(os.listdir(folder / "checkpoints"))
    for _ in range(2):  # the next start does not begin anew
        with pytest.raises(RunFailure, match="no checkpoint"):
            run(clips, folder, 5)
    assert (digests(folder), sorted(os.listdir(folder / "checkpoints"))) == before


@pytest.fixture
def opened(tmp_path):
    """A function that opens the folder tmp_path/run for a run, as training does."""

    def open_folder(tracker=None, **settings):
        changes = [f"run.{name}={value}" for name, value in settings.items()]
        config = load_config(CONFIG, [f"run.dir={tmp_path / 'run'}", "run.checkpoint_every=2", *changes])
        return closing(RunFolder(config, ["data"], tmp_path, tracker))

    return open_folder


@pytest.mark.parametrize("sign", ["damaged", "went on", "steps"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(opened, sign, tmp_path):
    folder = tmp_path / "run"
    with opened() as run:
        for step in range(1, 6 if sign == "steps" else 3):
            run.log(step, {}, {})
            if step % 2 == 0:
                run.checkpoints.save(step, {"step": jnp.int32(step)}, {"at": step})
    if sign == "went on":
        with opened():
            pass
    (folder / "checkpoints").rename(folder / ("damaged" if sign == "damaged" else "lost"))
    logged = digests(folder)
    move = "move 2 from damaged/ back into checkpoints/, " if sign == "damaged" else ""
    for _ in range(2):
        with pytest.raises(
            InputError, match=f"{folder} holds a run whose checkpoints are gone: .*storage, {move}choose"
        ):
            opened().__enter__()
        assert digests(folder) == logged
    if sign == "damaged":
        (folder / "damaged/2").rename(folder / "checkpoints/2")
        with opened() as run:
            assert run.restore({"step": jnp.int32(0)})[1] == {"at": 2}


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(opened, tmp_path):
    for _ in range(2):
        with opened() as run:
            assert not run.resumes and read_records(tmp_path / "run/metrics.jsonl") == []
            for step in range(1, 5):  # the first checkpoint is begun after the second step, and not whole
                run.log(step, {}, {})


def test_a_tracker_is_remembered_over_starts_that_ask_none(opened, tmp_path):
    one, other = (
        {"tracker": {"model": name, "checkpoint": f"{name}.pt"}, "tracker_device": name, "tracker_versions": {}}
        for name in ("one", "other")
    )
    for tracker in (one, None, None):
        with opened(tracker) as run:
            if not run.resumes:
                run.checkpoints.save(1, {"step": jnp.int32(1)}, {})
        assert json.loads((tmp_path / "run/run.json").read_text()).items() >= one.items()
    with pytest.raises(InputError, match="another tracker .one.pt and other.pt."):
        opened(other)


def test_logs_are_mended_at_a_start_and_else_left_alone(tmp_path):
    config = load_config(CONFIG, [f"run.dir={tmp_path}"])
    log = tmp_path / "evaluation.jsonl"
    labelled = '{"step": 3, "label": "by hand", "jf": 0.5}'
    log.write_text(f'{labelled}\n{{"step": 1, "jf": 0.1}}\n{labelled}')  # a step to come; the last end is missing
    seen = []
    for _ in range(2):
        with closing(RunFolder(config, ["data"], tmp_path)):
            seen.append((log.read_text(), log.stat().st_mtime_ns))
    assert seen[0][0] == f"{labelled}\n{labelled}\n" and seen[0] == seen[1]


def test_verify_repeats_the_first_steps_and_names_the_first_difference(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    verify.main(str(folder), 1)
    assert "1 step repeats" in capsys.readouterr().out
    rows = digests(folder)
    rows[0]["rewards"] = "0" * 16
    (folder / "digests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFailure, match="step 1, rewards$"):
        verify.main(str(folder), 1)
    manifest = json.loads((folder / "run.json").read_text())
    manifest |= {"data_fingerprints": ["0"], "versions": manifest["versions"] | {"jax": "0.1"}}
    (folder / "run.json").write_text(json.dumps(manifest))
    causes = f"other clips in data.train .its files or filter.json., versions jax {jax.__version__} instead of 0.1"
    with pytest.raises(RunFailure, match=f"step 1, rewards; they were taken again with {causes}$"):
        verify.main(str(folder), 1)
    with pytest.raises(InputError, match="digests.jsonl"):
        verify.main(str(tmp_path), 1)


@pytest.fixture(scope="module")
def command(clips):
    def start(folder, steps, *extra, environment=()):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        arguments = overrides(clips, folder, steps, *extra)
        return subprocess.Popen(training(folder, arguments), env=os.environ | dict(environment), **pipes)

    return start


def wait_for(condition, process, seconds=300):
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)


def test_kills_and_sigterm_change_nothing(straight, clips, command, tmp_path):
    """Killed at three moments, one of them while a checkpoint is written, then told to stop, then finished."""
    folder = tmp_path / "run"
    arguments = overrides(clips, folder, STEPS, "run.checkpoint_every=1")
    kill_at_random(training(folder, arguments), folder, kills=3, rng=np.random.default_rng(1))

    before = len(digests(folder))
    ended = command(folder, STEPS, "run.checkpoint_every=100")
    wait_for(lambda: len(digests(folder)) != before, ended)
    ended.send_signal(signal.SIGSTOP)  # so that it has not ended yet, however long the next lines take
    with pytest.raises(InputError, match="another process"):
        run(clips, folder, STEPS)
    ended.send_signal(signal.SIGTERM)
    ended.send_signal(signal.SIGCONT)
    _, words = ended.communicate(timeout=300)
    assert ended.returncode == 0, words

    state = run(clips, folder, STEPS, "run.checkpoint_every=1")
    assert_same_parameters(straight[1], state)
    assert differences(straight[0], folder) == []
    metrics = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(1, STEPS + 1))
    assert sum(examples_used(folder).values()) == 2 * STEPS  # of the group


def test_sigterm_ends_an_evaluation_at_once():
    with heed_sigterm() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(Interrupted), interruption.at_once():
            raise AssertionError("it has been asked for before")
    with heed_sigterm() as interruption:
        with pytest.raises(Interrupted), interruption.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal did not come")
        os.kill(os.getpid(), signal.SIGTERM)  # outside it is only noted


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_tokens(clips, command, tmp_path):
    """From 1 device to 8 (2 x 2 x 2) and back, with other microbatches: rounding is all that differs."""
    sizes = ["rollout.prompts_per_step=4", "learner.learning_rate=1e-4"]
    straight = run(clips, tmp_path / "straight", 4, *sizes)
    folder = tmp_path / "run"
    run(clips, folder, 2, *sizes)
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "learner.prompts_per_microbatch=4"]
    _, words = command(folder, 3, *sizes, *mesh, environment=eight).communicate(timeout=600)
    assert "mesh tensor 2 instead of 1; that may change its bits" in words
    state = run(clips, folder, 4, *sizes, "learner.prompts_per_microbatch=2")
    for ours, alone in zip(digests(folder), digests(tmp_path / "straight"), strict=True):
        assert {name: ours[name] for name in ("data", "tokens", "rewards")} == {
            name: alone[name] for name in ("data", "tokens", "rewards")
        }
    gaps = [
        np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (straight.trained, state.trained)), strict=True)
    ]
    # Adam makes whole steps, of any sign, of gradients that are nothing but rounding.
    assert np.mean(np.concatenate(gaps) > 1e-5) < 0.01
