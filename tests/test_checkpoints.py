"""Which checkpoints stay, what a disk that refuses does to them, and which ones are taken for damaged."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from child_processes import ROOT, run_two

from revseg_jax.errors import RunFailure
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest
from revseg_jax.run.checksums import checksums

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


# ---- What cannot be read ---------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, NewestAndBest(2, 0, {}))
    for step in (1, 2):
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, {"at": step})
    checkpoints.close()
    return folder


def test_numbers_that_are_not_those_that_were_saved_are_damage(two, capsys):
    """The file of the arrays is sound, but of other arrays."""
    other = Checkpoints(two.parent / "other", NewestAndBest(2, 0, {}))
    kernel = STATE["kernel"].at[1000:1010].set(0)
    other.save(2, {"kernel": kernel, "step": jnp.int32(2)}, {"at": 2})
    other.close()
    shutil.rmtree(two / "2/state")
    shutil.move(two.parent / "other/2/state", two / "2/state")
    step, state, data = Checkpoints(two, NewestAndBest(2, 0, {})).restore(STATE)
    assert (step, data) == (1, {"at": 1}) and (two.parent / "damaged/2").is_dir()
    np.testing.assert_array_equal(state["kernel"], STATE["kernel"])
    assert f"checkpoint {two}/2 is damaged: kernel is not what was saved" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_checksums_are_those_of_the_bits_and_their_places(dtype):
    array = np.random.default_rng(1).normal(size=(13, 7)) * 100
    array = np.asarray(jnp.asarray(array).astype(dtype))
    total = 0
    for place, word in enumerate(array.view(f"uint{8 * array.itemsize}").ravel().tolist()):
        word ^= place * 0x9E3779B1 % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's fmix32
            word = (word ^ word >> shift) * factor % 2**32
        total += word ^ word >> 16
    assert checksums({"a": {"b": array}}) == {"a.b": total % 2**32}
    others = [array[::-1], array.T, -array, array.reshape(7, 13)[:, ::-1].reshape(13, 7)]
    assert len({total % 2**32} | {checksums([other.copy()])["0"] for other in others}) == 5


@pytest.mark.parametrize("of", ["arrays", "iterator"])
def test_a_checkpoint_that_the_system_does_not_let_read_is_not_damaged(two, of, tmp_path, monkeypatch):
    files = [path for path in (two / "2/state").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size) if of == "arrays" else two / "2/data/metadata"
    shutil.move(file, tmp_path / "kept")
    if of == "arrays":
        file.symlink_to(file)  # "Too many levels of symbolic links", from TensorStore
    else:
        monkeypatch.chdir(file.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as name:
            name.bind(file.name)  # "No such device or address", from Python
    with pytest.raises(RunFailure, match=f"cannot read checkpoint {two}/2: .*its files may be sound") as error:
        Checkpoints(two, NewestAndBest(2, 0, {})).restore(STATE)
    assert "\n" not in str(error.value) and steps_of(two) == ["1", "2"] and not (tmp_path / "damaged").exists()
    file.unlink()
    shutil.move(tmp_path / "kept", file)
    assert Checkpoints(two, NewestAndBest(2, 0, {})).restore(STATE)[0] == 2


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest
state = {"kernel": jnp.zeros(1 << 26)}  # 256 MiB
checkpoints = Checkpoints(Path(sys.argv[1]), NewestAndBest(2, 0, {}))
for step in (1, 2):
    checkpoints.save(step, state, {})
checkpoints.close()
checkpoints = Checkpoints(Path(sys.argv[1]), NewestAndBest(2, 0, {}))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
checkpoints.restore(state)
"""


def test_a_machine_short_of_memory_finds_no_checkpoint_damaged(tmp_path):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "checkpoints")]
    # malloc must give back what saving needed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr
    failure = f"RunFailure: cannot read checkpoint {tmp_path}/checkpoints/2: Unable to allocate 256. MiB"
    assert failure in words and "its files may be sound" in words.splitlines()[-1]
    assert steps_of(tmp_path / "checkpoints") == ["1", "2"] and not (tmp_path / "damaged").exists()


TOGETHER = """
import os, sys
from pathlib import Path
import jax, numpy as np
from child_processes import report
from revseg_jax.parallel.processes import failing_together, gather, leads
from revseg_jax.parallel.startup import start_processes
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest

folder = Path(sys.argv[2])
start_processes()
parts = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x"))
noise = np.random.default_rng(0).normal(size=(8, 1000))

def state(step):
    return {"kernel": jax.make_array_from_callback(noise.shape, parts, lambda index: (noise + step)[index])}

def opened():
    return Checkpoints(folder / "checkpoints", NewestAndBest(3, 0, {}))

with failing_together():
    checkpoints = opened()
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.close()
    if leads():
        os.truncate(folder / "checkpoints/2/data/metadata", 0)  # all read it
        files = (folder / "checkpoints/3/state/ocdbt.process_1/d").iterdir()
        os.truncate(max(files, key=lambda path: path.stat().st_size), 0)  # the second process's parts
    gather(None)
    checkpoints = opened()
    step, restored, data = checkpoints.restore(state(0))
    for one, expected in zip(restored["kernel"].addressable_shards, state(1)["kernel"].addressable_shards, strict=True):
        np.testing.assert_array_equal(one.data, expected.data)
    damaged = checkpoints.damaged_steps()
    checkpoints.save(2, restored, data)
    checkpoints.close()
    report([step, data, damaged, opened().latest_step()])
"""


def test_processes_take_the_same_checkpoint_and_one_of_them_moves_the_damaged_ones(tmp_path):
    for index, (found, errors, status) in enumerate(run_two(TOGETHER, str(tmp_path))):
        assert status == 0, errors[-3000:]
        assert found == [1, {"at": 1}, [2, 3], 2]
        assert errors.count("is damaged") == (0 if index else 2)
    assert (tmp_path / "damaged/3/data/metadata").read_text() == '{"at": 3}'  # nothing of it was deleted
    assert (tmp_path / "damaged/2/state").is_dir()
