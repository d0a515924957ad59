"""`revseg evaluate`: the whole chain on held-out clips."""

from __future__ import annotations

import dataclasses
import json

from revseg_jax.config import Config
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.held_out import Evaluation, evaluate_policy
from revseg_jax.rollout.loading import load_engine
from revseg_jax.train import tracker_client


def main(config: Config) -> Evaluation:
    """Evaluates `policy.path` on `data.test` and prints the scores as one JSON object."""
    source = ClipSource(config.data.test, config.data.test_split)
    loaded = load_engine(config)
    with tracker_client(config) as client:
        evaluation, _ = evaluate_policy(
            loaded.greedy, (loaded.trained, loaded.frozen), source, config, client, "policy"
        )
    print(json.dumps(dataclasses.asdict(evaluation)))
    return evaluation
