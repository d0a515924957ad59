"""What one sees of a run: its numbers in all places, the terminal's line, throughput."""

import contextlib
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from revseg_jax.chain.parsing import parse_turn1, parse_turn2
from revseg_jax.config import LearnerConfig, load_config
from revseg_jax.errors import InputError
from revseg_jax.learner.flops import _layers_size, forward_flops, peak_flops, update_flops
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.chains import Rollout
from revseg_jax.run.manifest import changed_conditions
from revseg_jax.run.metrics_writer import MetricsWriter
from revseg_jax.run.progress import Progress
from revseg_jax.step_metrics import failure_metrics, speed_metrics


def tensorboard_events(folder):
    """(name, step, value) of all scalars; TFRecord framing: length, its checksum, data, their checksum."""
    found = []
    for path in sorted(folder.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += length + 16
    return found


def test_numbers_go_to_the_file_and_to_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, "", {})
    writer.write(1, {"reward/total": 0.5, "learner/loss": math.nan})
    writer.write(2, {"reward/total": 0.75, "learner/loss": -1.0})
    writer.show(2, {"evaluation/jf": 40.0})
    writer.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["step"], row["reward/total"], row["learner/loss"]) for row in rows] == [(1, 0.5, None), (2, 0.75, -1)]
    shown = tensorboard_events(tmp_path / "tensorboard")
    assert {("reward/total", 1, 0.5), ("reward/total", 2, 0.75), ("learner/loss", 2, -1.0)} < set(shown)
    assert ("evaluation/jf", 2, 40.0) in shown and "evaluation/jf" not in rows[1]


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'revseg-jax\[wandb\]'"):
        MetricsWriter(tmp_path, "project", {})


def test_wandb_gets_the_numbers_and_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        writer = MetricsWriter(tmp_path, "project", {"seed": 7})
        writer.write(step, {"reward/total": 0.5})
        writer.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1] and list((tmp_path / "wandb").glob("offline-run-*"))


METRICS = {f"reward/{name}": 0.25 for name in ("total", "format", "temporal", "spatial", "mask")}


def test_away_from_a_terminal_progress_is_a_few_plain_lines(capsys):
    progress = Progress(10, 100)
    for step in range(11, 101):
        progress.show(step, METRICS)
    progress.close()
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and "\r" not in said.err and "\x1b" not in said.err
    assert [line.split(":")[0] for line in lines] == [f"step {step} of 100" for step in (11, *range(15, 101, 5))]
    assert lines[-1].startswith("step 100 of 100: total 0.25, ") and lines[-1].endswith(" s a step, 0 min left")


def test_on_a_terminal_progress_is_one_line_with_rate_and_time_left(monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))  # rows, columns
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(0, 4)
        for step in range(1, 5):
            progress.show(step, METRICS)
        progress.close()
        monkeypatch.undo()
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal that was closed
        while part := os.read(ours, 100_000):
            said += part
    os.close(ours)
    said = said.decode()
    assert said.count("\n") == 1  # at its end
    last = said.strip().split("\r")[-1]
    assert "4/4" in last and "total=0.25" in last and "<00:00" in last and ("step/s" in last or "s/step" in last), said


def test_failures_are_counted_by_cause():
    good = Rollout("", "", parse_turn1("", 1), None, (0.0, 0.0, 1.0, 1.0), False, 1, 1)
    silent = Rollout("what?", None, parse_turn1("what?", 4), None, None, False, 3)
    keyframe = '<answer>[{"frame_idx": 1, "object description": "a fox"}]</answer>'
    boxless = Rollout(keyframe, "<answer>[1]</answer>", parse_turn1(keyframe, 4), parse_turn2("[1]"), None, False, 9, 3)
    shares = failure_metrics([good, silent, silent, boxless])
    assert shares == {
        "failures/any": 0.75,
        "failures/turn_1_no_answer_tag": 0.5,
        "failures/turn_2_bad_JSON": 0.25,
    }
    assert failure_metrics([good]) == {"failures/any": 0.0}


@pytest.fixture(scope="module")
def policy():
    return load_policy("embedded").policy


def test_matrices_are_counted_as_the_policy_holds_them(policy):
    from flax import nnx

    kernels = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(policy.text.layers)) if path[-1] == "kernel"]
    assert _layers_size(policy.config.text) == sum(leaf[...].size for _, leaf in kernels)


def test_flops_by_hand(policy):
    """1 prompt, 2 rollouts, one keyframe that both look at."""
    model, chain = policy.config, load_config("configs/demo.yaml", ["run.dir=none"]).chain
    text, vision = model.text, model.vision
    prefix = np.arange(80) < 70
    mask, generated = np.zeros((1, 2, 30), bool), np.zeros((1, 2, 30), bool)
    mask[0, 0, :25], mask[0, 1, :10] = True, True
    generated[0, 0, 1:6], generated[0, 1, 1:4] = True, True
    empty = dict.fromkeys(RolloutBatch._fields, np.zeros(0))
    arrays = {
        "prefix_mask": prefix[None],
        "mask": mask,
        "generated": generated,
        "keyframe_index": np.zeros((1, 2), int),
    }
    frames = np.zeros((1, chain.frames, chain.frame_size, chain.frame_size, 3), np.uint8)
    keyframes = np.zeros((1, 2, chain.keyframe_size, chain.keyframe_size, 3), np.uint8)
    batch = RolloutBatch(**empty | arrays | {"frames": frames, "keyframes": keyframes})
    seen, decoded = forward_flops(model, batch)

    heads = text.num_heads * text.head_dim
    pairs = 70 * 70 / 2 + (25 * 70 + 25 * 25 / 2) + (10 * 70 + 10 * 10 / 2)
    matrices = 2 * (70 + 25 + 10) * _layers_size(text) + 2 * 8 * text.hidden_size * text.vocab_size
    assert decoded == matrices + text.num_layers * 4 * heads * pairs
    blocks = vision.depth * (4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size)
    patches = chain.frames // 2 * (chain.frame_size // vision.patch_size) ** 2
    patches += (chain.keyframe_size // vision.patch_size) ** 2
    assert 2 * patches * blocks < seen < 4 * patches * blocks
    frozen, learnt = (LearnerConfig(freeze_vision=freeze, epochs=2) for freeze in (True, False))
    assert update_flops(model, frozen, batch) == 2 * (seen + 3 * decoded)
    assert update_flops(model, learnt, batch) == 2 * 3 * (seen + decoded)


def test_speed_follows_from_the_phases():
    phases = {"data": 1.0, "rollout": 4.0, "reference": 1.0, "reward_wait": 2.0, "update": 2.0}
    seconds = {f"seconds/{name}": value for name, value in phases.items()}
    metrics = speed_metrics(seconds, generated=500, update_flops=4e12, compilations=3)
    assert metrics["speed/tokens_per_second"] == 50 and metrics["speed/update_tflops_per_device"] == 2
    assert metrics["reward/wait_fraction"] == 0.2 and metrics["data/wait_fraction"] == 0.1
    assert "speed/mfu" not in metrics  # nobody knows a CPU's peak
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
    assert peak_flops("TPU v5p") == 459e12 and peak_flops("cpu") is None


def test_what_may_change_the_bits_is_named():
    before = {"versions": {"jax": "1", "numpy": "2"}, "platform": "Linux", "mesh": {"data": 1}, "flags": {}}
    before |= {"processes": 1, "device_kinds": ["cpu"]}
    now = before | {"versions": {"jax": "3", "numpy": "2"}, "mesh": {"data": 2}, "flags": {"XLA_FLAGS": "x"}}
    words = ["versions jax 3 instead of 1", "mesh data 2 instead of 1", "flags XLA_FLAGS x instead of None"]
    assert changed_conditions(before, now) == words
    assert changed_conditions(before, before) == [] and changed_conditions({}, now) == []
    tracked = before | {"tracker_device": "cpu", "tracker_versions": {"torch": "1"}}
    moved = before | {"tracker_device": "cuda:0", "tracker_versions": {"torch": "2"}}
    words = ["tracker_device cuda:0 instead of cpu", "tracker_versions torch 2 instead of 1"]
    assert changed_conditions(tracked, moved) == words and changed_conditions(tracked, before) == []


def test_deterministic_kernels_are_a_flag_that_xla_knows():
    program = (
        "from revseg_jax.run.determinism import use_deterministic_kernels as use; use(); use();"
        "import os, jax; jax.devices(); print(os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    flags = "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true"
    assert done.returncode == 0 and done.stdout.strip() == flags, done.stderr
