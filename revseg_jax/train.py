"""`revseg train`: rollouts, rewards, update; read from top to bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from revseg_jax.config import Config
from revseg_jax.data.pipeline import Batch, training_steps
from revseg_jax.data.source import ClipSource
from revseg_jax.digests import digest, parameter_digest
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.groups import NO_SPREAD, Groups, replace_groups_without_spread, sample_groups
from revseg_jax.interruption import Interruption, heed_sigterm
from revseg_jax.learner.experience import make_experience
from revseg_jax.learner.reference import fetch_reference, store_reference
from revseg_jax.learner.update import TrainState, make_learner
from revseg_jax.parallel.processes import (
    agree,
    failing_together,
    gather,
    leads,
    mean_over_processes,
    telling_others,
)
from revseg_jax.parallel.rows import check_spread, place_rows, process_share
from revseg_jax.rewards.total import RolloutReward, weights_from
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.loading import LoadedEngine, load_engine
from revseg_jax.rollout.traces import trace_record
from revseg_jax.run_folder import RunFolder
from revseg_jax.run_follower import RunFollower
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.tracker.connection import SidecarAway
from revseg_jax.tracker.process import open_tracker


def tracker_client(config: Config) -> AbstractContextManager[TrackerClient]:
    """A client of the configured sidecars, or of one started here for as long as the block lasts."""
    return open_tracker(config.tracker)


def main(config: Config) -> None:
    needs_tracker = weights_from(config.rewards).mask > 0
    with failing_together(), tracker_client(config) if needs_tracker else nullcontext() as client:
        state = train(config, load_engine(config), client)
        # Of several processes none has all parameters.
        known = parameter_digest(state.trained) if jax.process_count() == 1 else "spread over the processes"
    if leads():
        print(f"step {int(state.step)} of {config.run.steps}: parameters {known}")


def train(config: Config, loaded: LoadedEngine, client: TrackerClient | None) -> TrainState:
    """Trains to `run.steps`, from the newest checkpoint of the run folder when there is one.

    On SIGTERM the current phase is finished, the rest of its step given up, and the last whole step saved.
    `loaded.trained` is taken over when no reference shares it, and is then gone.
    """
    source = ClipSource(config.data.train, config.data.train_split, config.data.weights)
    open_run = partial(RunFolder, config, source.fingerprints) if leads() else partial(RunFollower, config)
    with heed_sigterm() as interruption, closing(open_run()) as run, telling_others():
        return run_steps(config, loaded, client, source, run, interruption)


def run_steps(
    config: Config,
    loaded: LoadedEngine,
    client: TrackerClient | None,
    source: ClipSource,
    run: RunFolder | RunFollower,
    interruption: Interruption,
) -> TrainState:
    check_spread(loaded.placement, config)
    if config.rollout.resample_limit and jax.process_count() > 1:
        raise InputError("rollout.resample_limit replaces groups by others of the same process: it needs one process")
    share = process_share(loaded.placement)
    steps = training_steps(
        source, config.chain, config.rollout.prompts_per_step, config.run.seed, *share, workers=config.data.workers
    )
    data = iter(steps)

    # ---- State: a fresh one, or the newest checkpoint's -------------------------------------------------------------
    learner = make_learner(loaded.engine.graphdef, config.learner, loaded.engine.encoder.layout, loaded.placement)
    # The reference is the policy before any update. Updates donate their state, which a shared reference must survive.
    reference = store_reference(config.learner.reference, loaded.trained) if config.learner.kl != "off" else None
    state = learner.init(loaded.trained, donate=reference is not loaded.trained)
    if run.resumes:
        state, iterator = run.restore(state)
        data.set_state(iterator)
    place = partial(place_rows, loaded.placement)

    # ---- The loop -------------------------------------------------------------------------------------------------
    first = done = saved = int(state.step)
    away: SidecarAway | None = None
    position = data.get_state()  # behind the last whole step
    bar = tqdm(
        range(first, config.run.steps),
        initial=first,
        total=config.run.steps,
        desc="train",
        unit="step",
        disable=not leads(),
    )
    for step in bar:
        clock = Clock()
        batch: Batch = next(data)
        clock.lap("data")

        weights = loaded.engine.weights((state.trained, loaded.frozen))
        sample = partial(sample_groups, config, loaded.engine, weights, client, step)
        groups, replaced = sample(batch), 0
        if config.rollout.resample_limit:
            try:
                groups, replaced = replace_groups_without_spread(config, groups, data, sample)
            except SidecarAway as error:
                away = error
                break
        del weights, sample  # the sampler's copy of the parameters makes room
        rollouts = place(groups.rollouts)
        clock.lap("rollout")
        if agree(interruption.requested):
            break

        # What the models say needs no rewards: it is computed while the sidecar works.
        fetched = fetch_reference(config.learner.reference, reference)
        scores = jax.block_until_ready(learner.score(state, fetched, loaded.frozen, rollouts))
        del fetched
        clock.lap("reference")
        try:
            rewards = groups.rewards(config)
        except SidecarAway as error:
            away = error
        clock.lap("reward_wait")
        away = agree(away)
        if away or agree(interruption.requested):
            break

        by_turn = np.array([[(reward.turn1, reward.turn2) for reward in row] for row in rewards])
        if config.learner.algorithm == "ppo":
            by_turn = place(by_turn.astype(np.float32))
        experience = make_experience(config.learner, learner.layout, rollouts, scores, by_turn)
        state, metrics = learner.update(state, loaded.frozen, place(experience))
        metrics = {f"learner/{name}": float(value) for name, value in metrics.items()}
        clock.lap("update")
        if not np.isfinite(metrics["learner/loss"]):
            raise RunFailure(f"step {step + 1}: the loss is {metrics['learner/loss']}")

        metrics |= mean_over_processes(step_metrics(groups, rewards)) | clock.seconds
        metrics["reward/wait_fraction"] = clock.seconds["seconds/reward_wait"] / sum(clock.seconds.values())
        metrics["rollout/groups_replaced"] = replaced
        metrics["rollout/logprob_gap"] = metrics.pop("learner/logprob_gap")
        done, position = step + 1, data.get_state()
        run.log(done, metrics, step_digests(groups.batch, groups.rollouts, rewards, metrics))
        bar.set_postfix({name: f"{metrics[f'reward/{name}']:.2f}" for name in ("total", "temporal", "spatial")})
        if config.run.traces_every and (done % config.run.traces_every == 0 or done == 1):
            records = gather(list(step_traces(config, groups, rewards, done)))
            run.write_traces(f"step_{done:06d}", (record for part in records for record in part))
        if done % config.run.checkpoint_every == 0 or done == config.run.steps:
            run.checkpoints.save(done, state, position)
            saved = done
        if agree(interruption.requested):
            break
    if done > saved:
        run.checkpoints.save(done, state, position)
    if away is not None:
        raise RunFailure(f"{away}; step {done} is saved, the same command goes on from there")
    if done < config.run.steps and leads():
        print(f"revseg: stopped by SIGTERM, step {done} is saved: the same command goes on from there", file=sys.stderr)
    return state


class Clock:
    """Splits a step's wall time into named phases."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{name}"] = now - self._last
        self._last = now


def step_metrics(groups: Groups, rewards: list[list[RolloutReward]]) -> dict[str, float]:
    """Means over all rollouts of a step, but for the count of truncated ones."""
    flat_rewards, flat_chains = [r for row in rewards for r in row], [c for row in groups.chains for c in row]
    metrics = {
        f"reward/{name}": float(np.mean([getattr(reward, name) for reward in flat_rewards]))
        for name in ("total", "format", "temporal", "spatial", "mask", "overlong")
    }
    spread = np.std([[reward.total for reward in row] for row in rewards], axis=1)
    return metrics | {
        "reward/groups_without_spread": float(np.mean(spread <= NO_SPREAD)),
        "rollout/turns": float(np.mean([reward.turns for reward in flat_rewards])),
        "rollout/tokens": float(np.mean([chain.tokens for chain in flat_chains])),
        "rollout/truncated": float(np.mean([chain.truncated for chain in flat_chains])),
        "rollout/truncated_count": sum(chain.truncated for chain in flat_chains),
        "rollout/wasted_decode_steps": 1 - groups.tokens / groups.decode_steps,
    }


def step_digests(
    batch: Batch, rollouts: RolloutBatch, rewards: list[list[RolloutReward]], metrics: dict[str, float]
) -> dict[str, str]:
    """One digest for each of `revseg_jax.digests.STAGES`, of all processes together."""
    update = {name: value for name, value in metrics.items() if name.startswith("learner/")}
    own = {
        "data": digest([batch.index, batch.video_id, batch.query, batch.frames]),
        "tokens": digest([rollouts.tokens, rollouts.mask]),
        "rewards": digest([rewards]),
        "update": digest([sorted(update.items())]),
    }
    parts = gather(own)
    return own if len(parts) == 1 else {name: digest(part[name] for part in parts) for name in own}


def step_traces(config: Config, groups: Groups, rewards, step: int) -> Iterator[dict[str, Any]]:
    for b, (row, earned) in enumerate(zip(groups.chains, rewards, strict=True)):
        for sample, (rollout, reward) in enumerate(zip(row, earned, strict=True)):
            yield trace_record(config.chain, groups.batch, b, sample, rollout, reward, step)
