"""Why chains fail; the command end to end with a real sidecar, killed and resumed."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import dataset_trees as trees
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from child_processes import wait_for
from PIL import Image
from prepared_datasets import jf

from revseg_jax.chain.parsing import parse_one_turn, parse_turn1, parse_turn2
from revseg_jax.cli import main
from revseg_jax.config import load_config
from revseg_jax.data.clip import decode_mask
from revseg_jax.data.example import make_example
from revseg_jax.data.prepare import prepare
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError
from revseg_jax.evaluation import chains as evaluation_chains
from revseg_jax.evaluation import held_out
from revseg_jax.evaluation import predict as prediction
from revseg_jax.evaluation.benchmarks import BENCHMARKS, find_data
from revseg_jax.evaluation.chains import answers, failure_cause
from revseg_jax.rewards.total import RolloutReward
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.rollout.loading import load_engine, spoken_chain, with_inference_dtypes

GOOD = '<think>a</think><answer>[{"frame_idx": 1, "object description": "it"}]</answer>'


@pytest.mark.parametrize(
    ("answer1", "answer2", "cause"),
    [
        ("nothing", None, "turn 1: no answer tag"),
        ("<answer>it is red</answer>", None, "turn 1: bad JSON"),
        ('<answer>[{"frame": 1, "description": "it"}]</answer>', None, "turn 1: JSON object of another form"),
        ("<answer>{'frame': 1}</answer>", None, "turn 1: JSON object of another form"),
        ("<answer>[1]</answer>", None, "turn 1: bad JSON"),
        ('{"frame": 1}', None, "turn 1: no answer tag"),
        (GOOD.replace("1", "9"), None, "turn 1: keyframe out of range"),
        (GOOD.replace('"it"', '""'), None, "turn 1: no text under 'object description'"),
        (GOOD, "there", "turn 2: no answer tag"),
        (GOOD, "<answer>here</answer>", "turn 2: bad JSON"),
        (GOOD, '<answer>[{"bbox_2d": [1, 2, 3]}]</answer>', "turn 2: JSON object of another form"),
        (GOOD, '<answer>[{"bbox_2d": [5, 5, 3, 9]}]</answer>', "turn 2: not x1 < x2 and y1 < y2 in finite numbers"),
        (GOOD, '<answer>[{"bbox_2d": [-5, 5, -3, 9]}]</answer>', "turn 2: the box covers nothing of the image"),
    ],
)
def test_failures_by_cause(answer1, answer2, cause):
    turn1, turn2 = parse_turn1(answer1, 8), parse_turn2(answer2) if answer2 else None
    assert failure_cause(Rollout(answer1, answer2, turn1, turn2, None, False, 1)) == cause


def test_failures_of_chains_of_one_turn():
    answer = '<think>a</think><answer>[{"frame_idx": 1, "bbox_2d": [5, 5, 3, 9]}]</answer>'
    rollout = Rollout(answer, None, *parse_one_turn(answer, 8), None, False, 1)
    assert failure_cause(rollout) == "turn 1: not x1 < x2 and y1 < y2 in finite numbers"


def test_nothing_to_find_earns_no_score():
    """A failed chain has empty masks, which are right where the query asks for what is not there."""
    reward = RolloutReward(0, 0, 0, 0, 0, 0, 0, 1)
    found = held_out.Scored("referring", True, 0.5, 0.7, reward, np.array([1.0, 0.0]), {})
    absent = held_out.Scored("non-existent", False, 1.0, 1.0, reward, np.zeros(2), {})
    summary = held_out._summary([found, absent, found])
    assert (summary.j, summary.f, summary.jf) == pytest.approx((50, 70, 60))
    assert summary.by_kind == pytest.approx({"referring": 60, "non-existent": 100}) and summary.clips == 3
    assert held_out._summary([absent]).jf == 100


def test_evaluation_samples_with_weights_made_for_it(clips, monkeypatch):
    """In the activations' type and gathered, as training does: not gathered, or cast, token by token."""
    loaded = load_engine(load_config(None, ["run.dir=.", "policy.dtype=bfloat16"]))
    types = set()

    def sample(engine, params, prompts, keys):
        types.update(leaf.dtype for leaf in jax.tree.leaves(params))
        return None, [[None]] * len(prompts)

    monkeypatch.setattr(RolloutEngine, "sample", sample)
    source, chain = ClipSource([clips], "test"), loaded.engine.encoder.chain
    list(answers(loaded.greedy, (loaded.trained, loaded.frozen), source, [0], chain))
    assert types == {jnp.dtype("bfloat16")}


def test_pairs_are_answered_in_batches_of_one_size(clips, monkeypatch):
    engine = load_engine(load_config(None, ["run.dir=."])).greedy
    monkeypatch.setattr(evaluation_chains, "BATCH", 2)
    monkeypatch.setattr(RolloutEngine, "weights", lambda engine, params: params)
    monkeypatch.setattr(
        RolloutEngine, "sample", lambda engine, params, prompts, keys: (None, [[prompt] for prompt in prompts])
    )
    source, chain = ClipSource([clips], "test"), engine.encoder.chain
    answered = list(answers(engine, None, source, [1, 2, 0], chain))
    assert [(len(found), len(batch), len(rows)) for found, batch, rows in answered] == [(2, 2, 2), (1, 2, 1)]
    found = [pair for clips, _, rows in answered for pair in zip(clips, rows, strict=True)]
    for (clip, prompt), pair in zip(found, (1, 2, 0), strict=True):
        expected = make_example(source[pair], pair, chain)
        assert clip.query == prompt.query == source[pair].query
        np.testing.assert_array_equal(prompt.frames, expected.frames)


def test_a_policy_that_is_not_trained_computes_in_the_devices_own_type(monkeypatch):
    def dtypes(*overrides):
        config = load_config(None, ["run.dir=.", *overrides])
        policy = with_inference_dtypes(config, [], overrides).policy
        return policy.dtype, policy.param_dtype

    assert dtypes() == ("float32", "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtypes() == ("bfloat16", "bfloat16")
    assert dtypes("policy.dtype=float32") == ("float32", "float32")
    assert dtypes("policy.param_dtype=float32") == ("bfloat16", "float32")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "synthetic"
    prepare_synthetic(folder, "easy", 0, 2, seed=4, progress=False)
    prepare("mevis", trees.mevis(tmp_path_factory.mktemp("mevis")), folder.parent / "mevis", ["valid"], progress=False)
    return folder


def test_evaluate_end_to_end_and_resumed(tmp_path, capsys, clips, monkeypatch):
    """Killed in the middle and started again, with the embedded policy and tracker: nothing is done twice, nothing
    is missing, and the table is that of the masks on disk. A benchmark without public truth gets its zip."""
    out = tmp_path / "out"
    arguments = ["evaluate", "--data", str(clips.parent), "--benchmarks", "synthetic,mevis", "--out", str(out)]
    arguments += ["--workers", "1", "tracker.threads=1"]
    total = len(ClipSource([clips], "test"))
    # Killed behind the 2 of MeViS, which comes first in the table, and half of the others.
    slow = "import pathlib, sys, time\nfrom revseg_jax import cli\nfrom revseg_jax.evaluation import predict\n"
    slow += "stopped, after, *arguments = sys.argv[1:]\nwritten, write = [], predict.write_prediction\n"
    slow += "def stopping(*what):\n    if len(written) == int(after):\n"
    slow += "        pathlib.Path(stopped).touch(); time.sleep(600)\n    written.append(write(*what))\n"
    slow += "predict.write_prediction = stopping\ncli.main(arguments)"
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-c", slow, str(stopped), str(2 + total // 2), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: stopped.exists() or process.poll() is not None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "another process evaluates into" in capsys.readouterr().err
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len((out / "synthetic/chains.jsonl").read_text().splitlines())
    assert 0 < done < total and not (out / "results.json").exists()
    with open(out / "synthetic/chains.jsonl", "a") as log:
        log.write('{"video": "cut off')  # as a killed process leaves it
    partial = next((out / "synthetic/predictions").iterdir()) / ".9.1234.partial"
    partial.mkdir()
    written, write = [], prediction.write_prediction
    monkeypatch.setattr(
        prediction, "write_prediction", lambda folder, *rest: (written.append(folder), write(folder, *rest))
    )
    main(arguments)
    printed = capsys.readouterr()
    assert len(written) == total - done and not partial.exists()
    with zipfile.ZipFile(out / "mevis/submission.zip") as archive:
        assert archive.namelist()[-1] == "d56a6ec78cfa/1/00003.png" and len(archive.namelist()) == 8
    records = [json.loads(line) for line in (out / "synthetic/chains.jsonl").read_text().splitlines()]
    assert len({(r["video"], r["expression"]) for r in records}) == len(records) == total
    results = json.loads((out / "results.json").read_text())
    failed = [record for record in records if record["failure"]]
    assert sum(results["failures"]["synthetic"].values()) == len(failed)
    mean = np.mean([record["jf"] for record in records])  # over both calls
    assert 100 * mean == pytest.approx(results["rows"][1]["jf"]) and f"J&F={100 * mean:.1f}" in printed.err
    root = out / "synthetic/predictions"
    for record in records:
        files = sorted((root / record["video"] / record["expression"]).glob("*.png"))
        if record["failure"]:
            assert not any(np.asarray(Image.open(file)).any() for file in files)
        assert len(files) > 1
    source = ClipSource([clips], "test")
    scores = []
    for clip in (source[i] for i in range(total)):
        folder = root / clip.video_id / clip.expression_id
        masks = np.stack([np.asarray(Image.open(folder / f"{name}.png")) > 0 for name in clip.frame_names])
        scores.append(jf(masks, np.stack([decode_mask(m, clip.height, clip.width) for m in clip.masks])))
    unknown, row = results["rows"][:2]
    assert unknown["title"] == "MeViS valid" and unknown["jf"] is None and unknown["expressions"] == 2
    assert (row["j"], row["f"]) == pytest.approx(tuple(np.mean(scores, axis=0)))
    assert f"{row['jf']:.1f}" in printed.out and "| synthetic, held out |" in (out / "results.md").read_text()
    with pytest.raises(SystemExit):
        main([*arguments, "--sampled", "tracker.checkpoint=/nowhere.pt"])  # no sidecar is started for that
    assert "another sampling" in capsys.readouterr().err
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"tracker": settings["tracker"][::-1]}))
    with pytest.raises(SystemExit):
        main(arguments)
    assert "holds predictions of another tracker" in capsys.readouterr().err


def test_a_full_disk_costs_no_chain(tmp_path, clips):
    """The list of finished chains is written anew at each start: one that cannot be written leaves it as it was."""
    content = '{"video": "somewhere else", "expression": "0"}\n' * 9
    (tmp_path / "predictions/somewhere else/0").mkdir(parents=True)
    (tmp_path / "chains.jsonl").write_text(content)
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        with pytest.raises(OSError, match="too large"):
            prediction.predict(BENCHMARKS["mevis"], clips.parent / "mevis", tmp_path, None, None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert (tmp_path / "chains.jsonl").read_text() == content


def test_a_folder_of_something_else_is_refused_before_a_sidecar_is_started(tmp_path, clips, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--data", str(clips), "--out", str(tmp_path), "tracker.checkpoint=/nowhere.pt"])
    assert stop.value.code == 2 and "is not empty and holds no evaluation" in capsys.readouterr().err


def test_no_data_is_said_so():
    with pytest.raises(InputError, match="no benchmark's data was named: write it"):
        find_data([], ["all"])


def test_frames_at_test_time_are_the_users_choice():
    overrides = ["run.dir=.", "chain.frames=12"]
    config = spoken_chain(load_config(None, overrides), [], overrides)
    assert config.chain.frames == 12 and config.chain.frame_size == 112  # the embedded policy's own size
