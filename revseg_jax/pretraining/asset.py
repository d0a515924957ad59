"""Trains the embedded policy and notes beside it how it was made and what it can do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revseg_jax.config import Config, PolicyConfig
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.evaluation.held_out import evaluate_policy
from revseg_jax.pretraining.policy_training import DIFFICULTY, STAGES, Stage, train_policy
from revseg_jax.rollout.loading import load_engine

TEST_CLIPS, TEST_SEED = 96, 1000


def make_policy(out: Path, config: Config, seed: int, stages: Sequence[Stage] = STAGES) -> None:
    """Trains into the new folder `out` and writes asset.json: command, seed, hash of the weights and scores."""
    train_policy(out, config.chain, seed, stages)
    made = {
        "command": f"revseg make-assets policy --seed {seed} --out DIR",
        "seed": seed,
        "steps": {stage.name: stage.steps for stage in stages},
    }
    write_note(out, config, made)


def write_note(out: Path, config: Config, made: dict[str, Any]) -> None:
    """asset.json in the policy folder `out`: how it was `made`, hash of the weights and scores.

    The scores are those of whole chains on held-out clips, sampled as in training, without tracking.
    """
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        prepare_synthetic(clips, DIFFICULTY, 0, TEST_CLIPS, seed=TEST_SEED, progress=False)
        loaded = load_engine(dataclasses.replace(config, policy=PolicyConfig(path=str(out))))
        evaluation, _ = evaluate_policy(
            loaded.engine, (loaded.trained, loaded.frozen), ClipSource([clips], "test"), config, None, "policy"
        )
    names = ("clips", "format", "temporal", "spatial", "turns", "best_constant_keyframe", "random_visible_keyframe")
    note = made | {
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "scores": {name: round(float(getattr(evaluation, name)), 4) for name in names},
    }
    (out / "asset.json").write_text(json.dumps(note, indent=2) + "\n")
