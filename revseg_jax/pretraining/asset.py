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
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.pretraining.choices import biggest_accuracy, naming_accuracy
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.policy_training import DIFFICULTY, STAGES, Stage, train_policy
from revseg_jax.rollout.loading import load_engine

TEST_CLIPS, ASKED_CLIPS, TEST_SEED = 96, 200, 1000


def make_policy(
    out: Path, config: Config, seed: int, stages: Sequence[Stage] = STAGES, start: Path | None = None
) -> None:
    """Trains into the new folder `out` and writes asset.json: command, seed, hash of the weights, scores, and how the
    policy `start` that it went on from was made."""
    train_policy(out, config.chain, seed, stages, start)
    made: dict[str, Any] = {
        "command": f"revseg make-assets policy --seed {seed} --out DIR",
        "seed": seed,
        "steps": {stage.name: stage.steps for stage in stages},
    }
    if start:
        made["command"] += f" --start START --stages {','.join(stage.name for stage in stages)}"
        made["start"] = how_made(start)
    write_note(out, config, made)


def how_made(policy: Path) -> dict[str, Any]:
    """What a policy folder's asset.json, where there is one, says of how it was made; and the hash of its weights."""
    note = policy / "asset.json"
    made = json.loads(note.read_text()) if note.exists() else {}
    return {name: made[name] for name in ("command", "seed", "steps", "start") if name in made} | {
        "sha256": weights_hash(policy)
    }


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def write_note(out: Path, config: Config, made: dict[str, Any]) -> None:
    """asset.json in the policy folder `out`: how it was `made`, hash of the weights and scores.

    The scores are those of whole chains on held-out clips, sampled as in training, without tracking; and how often
    it knows which of a scene's objects a query means, by kind, and in which frame an object is biggest.
    """
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        prepare_synthetic(clips, DIFFICULTY, 0, TEST_CLIPS, seed=TEST_SEED, progress=False)
        loaded = load_engine(dataclasses.replace(config, policy=PolicyConfig(path=str(out))))
        evaluation, _ = evaluate_policy(
            loaded.engine, (loaded.trained, loaded.frozen), ClipSource([clips], "test"), config, None, "policy"
        )
    loaded = load_policy(out)
    maker = ExampleMaker(
        loaded.tokenizer, loaded.policy.config, config.chain, DIFFICULTY, (0, 0, 1, 1), 0, seed=TEST_SEED
    )
    named = naming_accuracy(loaded.policy, maker, ASKED_CLIPS)
    biggest = biggest_accuracy(loaded.policy, maker, ASKED_CLIPS)
    names = ("clips", "format", "temporal", "spatial", "turns", "best_constant_keyframe", "random_visible_keyframe")
    note = made | {
        "sha256": weights_hash(out),
        "scores": {name: round(float(getattr(evaluation, name)), 4) for name in names}
        | {"named": {kind: round(share, 4) for kind, share in named.items()}, "biggest_frame": round(biggest, 4)},
    }
    (out / "asset.json").write_text(json.dumps(note, indent=2) + "\n")
