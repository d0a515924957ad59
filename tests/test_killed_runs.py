"""`revseg export` and `revseg verify` on what a killed run leaves: torn lines, cut files, no checkpoint yet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax import export, verify
from revseg_jax.config import load_config, to_yaml
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.rollout.loading import split_policy
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest
from revseg_jax.run.digests import STAGES
from revseg_jax.run.event_loops import waiting_event_loops
from revseg_jax.run.interruption import Interrupted

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(CONFIG, [f"run.dir={folder}", "rewards.mask=0"])))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints of two steps; the weights of step N have N added."""
    folder = write_config(tmp_path_factory.mktemp("runs") / "run")
    trained = split_policy(load_policy("embedded").policy, freeze_vision=True)[1]
    checkpoints = Checkpoints(folder / "checkpoints", NewestAndBest(2, 0, {}))
    for step in (1, 2):
        trained["text"]["norm"]["scale"].set_value(trained["text"]["norm"]["scale"][...] + 1)
        checkpoints.save(step, {"trained": trained, "step": jnp.int32(step)}, {"at": step})
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def cut(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def exported(run: Path, out: Path) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines on stderr of the command, which leaves the run as it was."""
    before = files(run)
    command = [sys.executable, "-m", "revseg_jax.cli", "export", str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert files(run) == before
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_export_of_a_sound_run_says_one_line(run, tmp_path):
    assert exported(run, tmp_path / "hf") == (0, f"step 2 of {run} written to {tmp_path / 'hf'}\n", [])


def test_export_takes_the_checkpoint_before_a_damaged_one(run, tmp_path):
    cut(run / "checkpoints" / "2")
    code, out, err = exported(run, tmp_path / "hf")
    assert code == 0 and out == f"step 1 of {run} written to {tmp_path / 'hf'}\n"
    assert len(err) == 1 and err[0].startswith(f"revseg: warning: checkpoint {run}/checkpoints/2 is damaged: ")
    scales = [load_policy(folder).policy.text.norm.scale[...] for folder in ("embedded", tmp_path / "hf")]
    np.testing.assert_array_equal(scales[0] + 1, scales[1])


def test_export_without_any_sound_checkpoint_fails_in_one_line(run, tmp_path):
    shutil.rmtree(run / "checkpoints" / "1")
    cut(run / "checkpoints" / "2")
    code, out, err = exported(run, tmp_path / "hf")
    assert (code, out) == (1, "") and not (tmp_path / "hf").exists()
    assert [line.split()[1] for line in err] == ["warning:", "error:"] and "train again" in err[1]


def test_export_of_a_run_without_a_checkpoint_writes_nothing_into_it(tmp_path):
    folder = write_config(tmp_path / "run")
    with pytest.raises(InputError, match="no checkpoint yet"):
        export.main(str(folder), str(tmp_path / "hf"))
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_export_refuses_an_existing_folder_before_it_loads_anything(run, tmp_path, monkeypatch):
    monkeypatch.delattr(export, "load_policy")
    (tmp_path / "mine.txt").touch()
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="exists already"):
            export.main(str(run), str(out))


def test_reads_under_way_end_before_their_event_loop_closes():
    ended = []

    async def read():
        await asyncio.sleep(0.01)
        ended.append("read")

    async def read_and_fail(tasks):
        tasks.append(asyncio.create_task(read()))
        raise ValueError

    with waiting_event_loops():
        loop = asyncio.new_event_loop()
    with pytest.raises(ValueError), contextlib.closing(loop):
        loop.run_until_complete(read_and_fail([]))
    assert ended == ["read"]
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        assert "WaitingLoop" not in type(loop).__name__


# --- verify ----------------------------------------------------------------------------------------------------------


def digest_lines(steps: int) -> str:
    return "".join(json.dumps({"step": step} | dict.fromkeys(STAGES, "0")) + "\n" for step in range(1, steps + 1))


@pytest.fixture
def trains_to(monkeypatch):
    """A function that sets the step at which verify's own training ends; it repeats everything."""
    ends = []

    def train(config, loaded, client):
        (Path(config.run.dir) / "digests.jsonl").write_text(digest_lines(ends[-1]))
        if ends[-1] < config.run.steps:
            raise Interrupted(f"step {ends[-1]} is saved")

    monkeypatch.setattr(verify, "load_engine", lambda config: None)
    monkeypatch.setattr(verify, "train", train)
    return ends.append


def test_verify_leaves_out_a_line_that_a_crash_cut_off(trains_to, tmp_path, capsys):
    folder = write_config(tmp_path / "run")
    (folder / "digests.jsonl").write_text(digest_lines(3)[:-20])
    trains_to(2)
    verify.main(str(folder), 3)
    assert "2 steps repeat" in capsys.readouterr().out


def test_verify_that_is_stopped_does_not_say_that_steps_repeat(trains_to, tmp_path, capsys):
    folder = write_config(tmp_path / "run")
    (folder / "digests.jsonl").write_text(digest_lines(3))
    trains_to(1)
    with pytest.raises(Interrupted, match="^nothing was compared: verify starts anew"):
        verify.main(str(folder), 3)
    assert capsys.readouterr().out == ""
