"""The benchmarks that no other test runs do run, small, and measure what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from revseg_jax.compilation.programs import make_programs
from revseg_jax.config import load_config
from revseg_jax.learner.flops import update_flops
from revseg_jax.parallel.sharding import make_placement

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, devices: int = 1) -> dict:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_whole_step_by_phase(devices):
    settings = ["rollout.prompts_per_step=8", "rollout.prompts_per_batch=4", "rollout.group_size=2"]
    settings += [f"mesh.tensor={2 if devices > 1 else 1}", "learner.prompts_per_microbatch=4", "policy.remat=full"]
    config = ROOT / "configs/demo.yaml"
    result = run("step.py", "--config", str(config), "--repeats", "1", *settings, devices=devices)
    programs = make_programs(load_config(config, settings[:3]), make_placement(load_config(config).mesh))
    assert result["update"]["flops"] * devices == update_flops(
        programs.model, programs.config.learner, programs.full_batch()
    )
    # Rollouts go batch by batch, everything else once.
    runs = {name: len(times) for name, times in result["all_seconds"].items()}
    once, twice = ("weights for sampling", "score", "update"), ("prefill", "turn 1", "keyframes", "turn 2")
    assert runs == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    assert sum(result["seconds"].values()) == result["step_seconds"]


def test_sampler_and_learner_are_as_near_to_float64_as_torch_is():
    result = run("logprob_gap.py", "--prompts", "4")
    distances = {name: row["mean"] for name, row in result["distances"].items()}
    assert result["tokens"] > 1000
    assert 0 < distances["sampler and learner"] < 2 * distances["torch whole and cached"]
    assert 0 < distances["learner and float64"] < 2 * distances["torch whole and float64"]
