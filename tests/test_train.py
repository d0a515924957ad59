"""Training end to end, small: real clips, a real sidecar, real checkpoints."""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tracker_setup import until

from benchmarks.resume import WALL_TIME
from revseg_jax import export, train
from revseg_jax.config import load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.rollout.loading import load_engine
from revseg_jax.run.folder import check_same_settings
from revseg_jax.run.interruption import Interrupted
from revseg_jax.train import tracker_client

MEASURES = set(
    """
    reward/total reward/format reward/temporal reward/spatial reward/mask reward/overlong reward/groups_without_spread
    rollout/turns rollout/tokens rollout/tokens_turn1 rollout/tokens_turn2 rollout/tokens_longest rollout/truncated
    rollout/padding rollout/wasted_decode_steps rollout/logprob_gap rollout/groups_replaced failures/any
    learner/loss learner/kl learner/clip_fraction learner/entropy learner/gradient_norm learner/skipped_updates
    learner/bad_steps seconds/data seconds/rollout seconds/reference seconds/reward_wait seconds/update
    reward/wait_fraction data/wait_fraction speed/tokens_per_second speed/update_tflops_per_device speed/compilations
    memory/host_gib
    """.split()
)
CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=3", "rollout.prompts_per_batch=1", "run.traces_every=1"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    prepare_synthetic(folder, "easy", 4, 2, seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def client():
    with tracker_client(load_config(CONFIG, ["tracker.threads=1"])) as client:
        yield client


def run(clips, client, folder, steps, *extra):
    overrides = [*SMALL, f"data.train=[{clips}]", f"run.dir={folder}", f"run.steps={steps}", *extra]
    config = load_config(CONFIG, overrides)
    return train.train(config, load_engine(config), client)


@pytest.fixture(scope="module")
def compilations():
    """(steps that were logged before, program) of everything that `finished` compiles."""
    return []


@pytest.fixture(scope="module")
def finished(clips, client, tmp_path_factory, compilations):
    folder = tmp_path_factory.mktemp("runs") / "straight"

    def note(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            path = folder / "metrics.jsonl"
            compilations.append((len(lines(path)) if path.exists() else 0, details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        return folder, run(clips, client, folder, 3, "run.checkpoint_every=2")
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_everything_is_compiled_in_the_first_step(finished, compilations):
    """Whatever the rollouts are: their lengths, failures and keyframes differ from step to step."""
    assert compilations and {steps for steps, _ in compilations} == {0}, [name for steps, name in compilations if steps]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_metrics_traces_and_a_manifest(finished):
    folder, state = finished
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        # The largest of all tokens. The embedded policy is sure of most of what it says, so its logits are large and
        # their rounding too: 6.4e-5 was the largest of three demo runs, at a mean of 2e-7.
        assert row["rollout/logprob_gap"] < 1e-4
        assert 0 <= row["rollout/logprob_gap_mean"] < 2e-6
        assert 0 <= row["reward/format"] <= 1 and 1 <= row["rollout/turns"] <= 2
    assert int(state.step) == 3
    traces = lines(folder / "traces/step_000003.jsonl")
    assert len(traces) == 6
    assert np.mean([trace["reward"]["total"] for trace in traces]) == pytest.approx(metrics[-1]["reward/total"])
    assert np.mean([trace["reward"]["mask"] for trace in traces]) == pytest.approx(metrics[-1]["reward/mask"])
    assert all(MEASURES <= row.keys() for row in metrics)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["versions"]["jax"] == jax.__version__ and len(manifest["data_fingerprints"]) == 1
    assert manifest["config"]["run"]["steps"] == 3 and manifest["seed"] == 0 and manifest["command"] == sys.argv
    assert manifest["tracker"]["checkpoint"] == "embedded" and manifest["tracker_versions"].keys() > {"torch", "sam2"}
    assert manifest["mesh"]["tensor"] == 1 and manifest["platform"] and manifest["device_kinds"]
    assert len(manifest["git"]["revision"]) == 40 and manifest["git"]["clean"] in (True, False)


def test_ctrl_c_saves_and_the_same_command_goes_on(clips, client, tmp_path, capfd):
    folder = tmp_path / "run"

    def press() -> None:
        until(lambda: (folder / "metrics.jsonl").exists())  # the first step is done
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt) as interrupt:
            run(clips, client, folder, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    done = len(lines(folder / "metrics.jsonl"))
    assert str(interrupt.value) == f"step {done} is saved: the same command goes on from there"
    assert (folder / "checkpoints" / str(done)).is_dir() and done < 3
    assert int(run(clips, client, folder, 3).step) == 3
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "said", "number", "raised"),
    [
        (0, "no step was finished: the same command starts anew", signal.SIGTERM, Interrupted),
        (1, "step 1, the last, is saved", signal.SIGTERM, Interrupted),
        (1, "step 1, the last, is saved", signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_who_stops_it_at_its_ends_is_heard(clips, client, tmp_path, monkeypatch, step, said, number, raised):
    """In the evaluation before the first step, and in that after the last."""
    monkeypatch.setattr(
        train, "evaluate_when_due", lambda *arguments: arguments[4] == step and signal.raise_signal(number)
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(raised, match=said):
            run(clips, client, tmp_path / "run", 1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wrong_place_shows_before_anything_is_loaded(finished, clips, tmp_path):
    folder, _ = finished
    nowhere = ["tracker.checkpoint=/nowhere.pt", "policy.path=/nowhere"]
    for options, message in (
        ([f"data.train=[{clips}]", "run.evaluate_every=1", "data.test=[/no/clips]"], "/no/clips is not a prepared"),
        (["data.train=[/no/clips]"], "/no/clips is not a prepared dataset"),
        ([f"data.train=[{clips}]", f"run.dir={clips}"], "is a prepared dataset: choose another folder"),
        ([f"data.train=[{clips}]", f"run.dir={folder}"], "holds a run with another config"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(load_config(CONFIG, [f"run.dir={tmp_path}", *nowhere, *options]))
    assert not list(tmp_path.iterdir())


def test_what_a_continued_run_may_have_otherwise(finished, clips, tmp_path):
    """How much is computed at a time, and what is evaluated until something has been."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")

    def check(*changes: str) -> None:
        options = [*SMALL, f"data.train=[{clips}]", "run.checkpoint_every=2", *changes]
        check_same_settings(tmp_path / "run", load_config(CONFIG, [f"run.dir={tmp_path / 'run'}", *options]))

    sizes = ["rollout.prompts_per_batch=2", "learner.prompts_per_microbatch=1", "learner.logprob_chunk=64"]
    check("data.train=[/elsewhere]", "data.workers=2")  # what is in it is compared, not what it is called
    check(*sizes, "policy.remat=full", "run.evaluate_every=2", f"data.test=[{clips}]", "data.test_clips=1")
    with pytest.raises(InputError, match="learner.learning_rate"):
        check("learner.learning_rate=1")
    (tmp_path / "run/evaluation.jsonl").write_text('{"step": 2, "jf": 50.0}\n')
    with pytest.raises(InputError, match="data.test_clips: 96 -> 1"):
        check("data.test_clips=1")


def test_evaluations_keep_to_the_schedule_and_the_best_checkpoint_stays(clips, client, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [f"data.test=[{clips}]", "run.evaluate_every=2", "run.keep_checkpoints=1", "learner.learning_rate=3e-3"]
    run(clips, client, folder, 3, *options)
    evaluations = lines(folder / "evaluation.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    chains = [lines(folder / "traces" / f"eval_{step:06d}.jsonl") for step in (0, 2, 3)]
    for row, traces in zip(evaluations, chains, strict=True):
        assert row["jf"] == pytest.approx(50 * np.mean([trace["j"] + trace["f"] for trace in traces]))
        assert {trace["step"] for trace in traces} == {row["step"]} and traces[0]["thumbs"]
    asked = [[(trace["video_id"], trace["expression_id"]) for trace in traces] for traces in chains]
    assert asked[0] == asked[1] == asked[2]
    assert [a["answer1"] for a in chains[0]] != [a["answer1"] for a in chains[2]]
    best = max((row["jf"], row["step"]) for row in evaluations[1:])[1]
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {str(best), "3"}
    export.main(str(folder), str(tmp_path / "hf"), best=True)
    assert f"step {best} of" in capsys.readouterr().out

    # Killed while it evaluated: the evaluation is made up for, the same to the last bit.
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations[:2]))
    (folder / "traces/eval_000003.jsonl").unlink()
    run(clips, client, folder, 3, *options)
    assert lines(folder / "evaluation.jsonl") == evaluations
    assert lines(folder / "traces/eval_000003.jsonl") == chains[2]


def test_a_stopped_run_goes_on_to_the_same_parameters(finished, clips, client, tmp_path):
    folder, straight = finished
    resumed = tmp_path / "resumed"
    run(clips, client, resumed, 2, "run.checkpoint_every=2")
    state = run(clips, client, resumed, 3, "run.checkpoint_every=2")
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    same = [
        [{k: v for k, v in row.items() if not WALL_TIME.match(k)} for row in lines(path / "metrics.jsonl")]
        for path in (folder, resumed)
    ]
    assert same[0] == same[1]


def test_another_config_on_the_same_folder_is_refused(finished, clips, client):
    folder, _ = finished
    with pytest.raises(InputError, match="learning_rate"):
        run(clips, client, folder, 4, "learner.learning_rate=0.1")


def test_export_gives_the_trained_policy(finished, tmp_path):
    folder, state = finished
    export.main(str(folder), str(tmp_path / "hf"))
    loaded = load_policy(tmp_path / "hf")
    kernel = loaded.policy.text.layers.query.kernel[...]
    np.testing.assert_array_equal(kernel, state.trained["text"]["layers"]["query"]["kernel"][...])
    assert loaded.chain == load_config(CONFIG).chain


def test_ppo_with_dynamic_sampling_goes_on_from_its_checkpoint(clips, client, tmp_path):
    """The critic is part of the checkpoint; batches that only replaced groups are not read again."""
    options = ["learner.algorithm=ppo", "learner.kl=reward", "learner.ppo.critic=head", "rollout.resample_limit=1"]
    options.append("learner.reference=host")
    first = run(clips, client, tmp_path / "run", 1, *options)
    critic = jax.tree.map(np.array, first.critic[0])
    assert np.abs(critic["head"]["kernel"]).max() > 0
    state = run(clips, client, tmp_path / "run", 2, *options)
    assert int(state.step) == 2
    moved = [
        np.abs(np.asarray(b) - a).max() for a, b in zip(*map(jax.tree.leaves, (critic, state.critic[0])), strict=True)
    ]
    assert 0 < max(moved) < 1e-3  # two steps of Adam at 1e-5, from where the first run ended and not from anew
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(np.isfinite(row["learner/value_loss"]) and row["rollout/groups_replaced"] >= 0 for row in metrics)
