"""gs:// paths for data, policies, checkpoints and runs, against the store's own protocol on loopback."""

from __future__ import annotations

import json
import os
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import dataset_trees
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from object_store import ObjectStore

import revseg_jax
from revseg_jax.cli import main
from revseg_jax.config import Config, load_config
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.evaluation.benchmarks import find_data
from revseg_jax.paths import local_copy, local_only, path_of
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.run.digests import parameter_digest
from revseg_jax.run.folder import RunFolder, check_folder
from revseg_jax.run.mirror import Mirror

pytestmark = pytest.mark.skipif(find_spec("gcsfs") is None, reason="gs:// paths need gcsfs")


@pytest.fixture(scope="module")
def store():
    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.environment()}
    os.environ |= store.environment()
    yield store
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    store.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(store: ObjectStore, folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"gs://{name}"


def test_clips_stream_from_the_store(store, tmp_path):
    prepare_synthetic(tmp_path / "clips", "easy", 3, 1, seed=0)
    remote, local = put(store, tmp_path / "clips", "data/clips"), str(tmp_path / "clips")
    there, here = ClipSource([remote], "train"), ClipSource([local], "train")
    assert there.fingerprints == here.fingerprints and len(there) == len(here)
    assert there[len(there) - 1] == here[len(here) - 1]
    store.put("data/clips/filter.json", json.dumps({"split": "train", "dropped": [here.ids()[0][0]]}).encode())
    assert len(ClipSource([remote], "train")) < len(here)
    with pytest.raises(InputError, match="not a prepared dataset"):
        ClipSource(["gs://data/nothing"], "train")
    with pytest.raises(InputError, match="copy it with gcloud"):
        prepare_synthetic("gs://data/new", "easy", 1, 1, seed=0)


def test_policies_are_copied_here_once_and_written_there_whole(store, tmp_path):
    policy = load_policy("embedded")
    policy.save("gs://policies/tiny")
    written = [key for key in store.objects if key.startswith("policies/tiny/")]
    assert written[-1] == "policies/tiny/config.json"  # without it the folder does not count
    again = load_policy("gs://policies/tiny")
    assert again.folder.is_relative_to(tmp_path / "cache")
    assert parameter_digest(nnx.state(again.policy)) == parameter_digest(nnx.state(policy.policy))
    assert local_copy(path_of("gs://policies/tiny")) == again.folder
    store.put("policies/tiny/chain.yaml", b"frames: 4\n")
    assert load_policy("gs://policies/tiny").chain.frames == 4
    with pytest.raises(InputError, match="exists already"):
        policy.save("gs://policies/tiny")
    with pytest.raises(InputError, match="does not exist"):
        load_policy("gs://policies/none")


STATE = {"weights": jnp.arange(6.0).reshape(2, 3), "step": jnp.array(0)}


def test_the_tilde_of_a_value_is_the_home_folder(tmp_path, monkeypatch):
    """Shells expand it only where a word begins."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs/a") == local_only("~/runs/a") == tmp_path / "runs/a"
    assert os.fspath(path_of("gs://b/~")) == "gs://b/~" and path_of("a/~") == Path("a/~")
    assert path_of("~nobody-here/a") == Path("~nobody-here/a")
    config = load_config(None, ["run.dir=~/r", "data.train=[~/a,b]", "tracker.token_file=~/t", "policy.path=gs://b/~"])
    assert (config.run.dir, config.data.train) == (f"{tmp_path}/r", [f"{tmp_path}/a", "b"])
    assert (config.tracker.token_file, config.policy.path) == (f"{tmp_path}/t", "gs://b/~")


def test_the_tilde_of_an_option_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dataset_trees.ref_davis17(tmp_path / "in")
    main(["prepare", "ref_davis17", "--source=~/in", "--out=~/out", "--workers=1"])
    found = {"ref_davis17": tmp_path / "out"}
    assert find_data(["~/out"], ["ref_davis17"]) == find_data(["~"], ["ref_davis17"]) == found
    (tmp_path / "out/chain").mkdir()
    (tmp_path / "out/chain/settings.json").write_text("{}")
    capsys.readouterr()
    for arguments, refusal in (
        (["prepare", "ref_davis17", "--source=~/none", "--out=~/out"], "/none is not a folder"),
        (["evaluate", "--data=~/out", "--out=~/out"], "/out is not empty and holds no evaluation"),
        (["reproduce", "chain", "--out=~/out"], "/out/chain holds results with another"),
        (["segment", "~/in/a.mp4", "which?", "--out=~/out"], "/out exists already"),
        (["segment", "~/in/a.mp4", "which?", "--out=~/new"], "/in/a.mp4 cannot be opened"),
        (["score", "~/none", "--benchmark=ref_davis17", "--data=~/out"], "/none"),
        (["sidecar", "--token-file=~/none"], f"token file {tmp_path}/none cannot be read"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and refusal in said and str(tmp_path) in said
    assert not list(tmp_path.glob("*~*"))


def state_at(step: int) -> dict:
    return {"weights": STATE["weights"] + step, "step": jnp.array(step)}


def run_config(*changes: str) -> Config:
    return load_config(None, ["run.dir=gs://runs/a", "run.keep_checkpoints=2", *changes])


def run_folder(*changes: str) -> RunFolder:
    return RunFolder(run_config(*changes), ["data"], Path(revseg_jax.__file__).parent / "assets" / "policy")


def test_a_run_lives_in_the_store_and_goes_on_from_another_machine(store, tmp_path, monkeypatch):
    with closing(run_folder()) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0 / step}, {"update": str(step)})
            if step < 3:
                run.write_traces(f"step_{step:06d}", [{"step": step}])
                run.checkpoints.save(step, state_at(step), {"position": step})
    names = [key.removeprefix("runs/a/") for key in store.objects if key.startswith("runs/a/")]
    assert {"config.yaml", "run.json", "metrics.jsonl", "traces/step_000002.jsonl", "owner"} <= set(names)
    assert any(name.startswith("checkpoints/2/") for name in names) and "lock" not in names

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with closing(run_folder()) as run:
        assert run.resumes
        state, iterator = run.restore(STATE)
        assert iterator == {"position": 2} and int(state["step"]) == 2
        np.testing.assert_array_equal(state["weights"], state_at(2)["weights"])
        logged = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert logged == [1, 2]
    for refuses in (run_folder, lambda change: check_folder(run_config(change))):
        with pytest.raises(InputError, match="another config"):
            refuses("rollout.group_size=3")
    check_folder(run_config())
    whole = {key: value for key, value in store.objects.items() if key.endswith("commit_success.txt")}
    for key in whole:
        del store.objects[key]  # as a run leaves it that was killed while it saved
    check_folder(run_config("rollout.group_size=3"))
    store.objects |= whole


def test_a_damaged_checkpoint_in_the_store_is_set_aside(store, capsys):
    with closing(run_folder()) as run:
        run.checkpoints.save(4, state_at(4), {"position": 4})
    for key in list(store.objects):
        if key.startswith("runs/a/checkpoints/4/state/") and "/d/" in key:
            store.put(key, b"")
    with closing(run_folder()) as run:
        state, _ = run.restore(STATE)
        assert int(state["step"]) == 2 and "checkpoints/4 is damaged" in capsys.readouterr().err
    assert any(key.startswith("runs/a/damaged/4/") for key in store.objects)


def test_the_trainer_that_came_last_owns_a_run(store, tmp_path, monkeypatch):
    first = run_folder("run.dir=gs://runs/b")
    first.log(1, {"loss": 1.0}, {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with closing(run_folder("run.dir=gs://runs/b")) as second:
        with pytest.raises(RunFailure, match="has taken over gs://runs/b"):
            first.checkpoints.save(1, state_at(1), {})
        assert not any(key.startswith("runs/b/checkpoints/1/") for key in store.objects)
        second.log(1, {"loss": 2.0}, {})
    assert json.loads(store.objects["runs/b/metrics.jsonl"])["loss"] == 2.0


def test_files_that_went_away_here_go_away_there(store):
    mirror = Mirror("gs://runs/c")
    (mirror.local / "traces").mkdir(parents=True)
    mirror.pull()
    for name in ("traces/a", "b"):
        (mirror.local / name).write_text(name)
    mirror.push()
    (mirror.local / "traces" / "a").unlink()
    mirror.push()
    assert {key for key in store.objects if key.startswith("runs/c/")} == {"runs/c/b", "runs/c/owner"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "synthetic", "--out", "gs://b/x"],
        ["filter", "gs://b/x"],
        ["segment", "video.mp4", "which?", "--out", "gs://b/x"],
        ["evaluate", "--out", "gs://b/x"],
        ["report", "gs://b/x"],
        ["demo", "run.dir=gs://b/x"],
    ],
)
def test_commands_that_need_a_disk_say_so(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "copy it with gcloud storage cp" in capsys.readouterr().err


def test_a_store_without_its_client_is_one_line(monkeypatch):
    monkeypatch.setattr("revseg_jax.paths.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gcsfs"):
        path_of("gs://b/x")
    assert path_of("runs/x") == Path("runs/x")
