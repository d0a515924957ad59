"""`revseg verify`: takes the first steps of a run again and says whether they come out the same, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

from revseg_jax.config import load_config
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.paths import path_of
from revseg_jax.rewards.total import weights_from
from revseg_jax.rollout.loading import load_engine
from revseg_jax.run.determinism import use_deterministic_kernels
from revseg_jax.run.digests import STAGES
from revseg_jax.run.folder import read_records
from revseg_jax.run.interruption import Interrupted
from revseg_jax.run.manifest import changed_conditions, other_inputs
from revseg_jax.train import tracker_client, train


def main(run: str, steps: int) -> None:
    """Prints one line when the first `steps` steps are the same; else raises RunFailure that names the first step and
    stage (data, tokens, rewards, update) that differ."""
    folder = path_of(run)
    recorded = read_records(folder / "digests.jsonl")
    steps = min(steps, len(recorded))
    if steps < 1:
        raise InputError(f"{folder} has no digests.jsonl with finished steps: there is nothing to compare with")
    config = load_config(folder / "config.yaml")
    with tempfile.TemporaryDirectory() as again:
        only = {"checkpoint_every": steps, "traces_every": 0, "evaluate_every": 0, "wandb": ""}
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=again, steps=steps, **only))
        if config.run.deterministic:
            use_deterministic_kernels()
        try:
            with tracker_client(config) if weights_from(config.rewards).mask > 0 else nullcontext() as client:
                train(config, load_engine(config), client)
        except (KeyboardInterrupt, Interrupted) as stopped:  # what it says was saved is gone with the folder
            raise type(stopped)("nothing was compared: verify starts anew") from None
        difference = first_difference(recorded[:steps], read_records(Path(again) / "digests.jsonl"))
        if difference:
            then, now = (json.loads((where / "run.json").read_text()) for where in (folder, Path(again)))
            causes = ", ".join(other_inputs(then, now) + changed_conditions(then, now))
            if causes:
                difference += f"; they were taken again with {causes}"
            raise RunFailure(f"{folder} does not repeat: {difference}")
    taken = "1 step repeats" if steps == 1 else f"{steps} steps repeat"
    print(f"{folder}: {taken} bit for bit ({', '.join(STAGES)})")


def first_difference(one: list[dict], other: list[dict]) -> str | None:
    """Where two runs' digests part, in words, or None when they do not."""
    for a, b in zip(one, other, strict=True):
        for stage in STAGES:
            if a[stage] != b[stage]:
                return f"the first difference is in step {a['step']}, {stage}"
    return None
