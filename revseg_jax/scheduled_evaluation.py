"""Evaluation while training goes on: the same held-out chains at every date, so that one can read how they change."""

from __future__ import annotations

import dataclasses
import sys

from tqdm import tqdm

from revseg_jax.config import Config
from revseg_jax.data.source import ClipSource
from revseg_jax.evaluation.held_out import evaluate_policy
from revseg_jax.learner.update import TrainState
from revseg_jax.parallel.processes import leads
from revseg_jax.rollout.loading import LoadedEngine
from revseg_jax.run.folder import RunFolder
from revseg_jax.run.follower import RunFollower
from revseg_jax.tracker.client import TrackerClient

ILLUSTRATED = 8  # chains of each evaluation that carry pictures into the report


def evaluation_due(config: Config, step: int) -> bool:
    """Before the first step, after every `run.evaluate_every` and after the last."""
    every = config.run.evaluate_every
    return every > 0 and (step % every == 0 or step == config.run.steps)


def evaluate_when_due(
    config: Config,
    loaded: LoadedEngine,
    client: TrackerClient | None,
    state: TrainState,
    step: int,
    run: RunFolder | RunFollower,
) -> None:
    """Evaluates the state after `step` steps on `data.test` and records it, when it is due and not recorded yet.

    Raises SidecarAway when no sidecar answers any more.
    """
    if not evaluation_due(config, step) or step in run.scores:
        return
    source = ClipSource(config.data.test, config.data.test_split)
    params = state.trained, loaded.frozen
    scores, traces = evaluate_policy(loaded.greedy, params, source, config, client, f"step {step}", ILLUSTRATED)
    run.log_evaluation(step, dataclasses.asdict(scores), [trace | {"step": step} for trace in traces])
    if leads():
        tqdm.write(f"step {step}: held-out J&F {scores.jf:.1f}", file=sys.stderr)
