"""`revseg train`: rollouts, rewards, update; read from top to bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from revseg_jax.config import Config, check_training
from revseg_jax.data.pipeline import Batch, training_steps
from revseg_jax.data.processes import cores
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.groups import Groups, replace_groups_without_spread, sample_groups
from revseg_jax.learner.experience import make_experience
from revseg_jax.learner.flops import update_flops
from revseg_jax.learner.reference import fetch_reference, store_reference
from revseg_jax.learner.update import TrainState, make_learner
from revseg_jax.parallel.processes import (
    agree,
    failing_together,
    first_gpu,
    gather,
    leads,
    telling_others,
)
from revseg_jax.parallel.rows import (
    check_spread,
    gather_shares,
    mean_over_shares,
    place_rows,
    process_share,
    same_in_share,
)
from revseg_jax.parallel.sharding import Placement
from revseg_jax.rewards.total import RolloutReward, weights_from
from revseg_jax.rollout.layout import PromptEncoder
from revseg_jax.rollout.loading import LoadedEngine, load_engine
from revseg_jax.rollout.traces import trace_record
from revseg_jax.run.determinism import use_deterministic_kernels
from revseg_jax.run.digests import digest, parameter_digest
from revseg_jax.run.folder import RunFolder, check_folder
from revseg_jax.run.follower import RunFollower
from revseg_jax.run.interruption import Interrupted, Interruption, heed_sigterm
from revseg_jax.run.progress import Progress
from revseg_jax.scheduled_evaluation import evaluate_when_due, evaluation_due
from revseg_jax.step_metrics import (
    Clock,
    Compilations,
    decode_steps,
    reward_metrics,
    rollout_metrics,
    speed_metrics,
)
from revseg_jax.tracker.client import TrackerClient, description
from revseg_jax.tracker.connection import SidecarAway
from revseg_jax.tracker.process import open_tracker


def tracker_client(config: Config) -> AbstractContextManager[TrackerClient]:
    """A client of the configured sidecars, or of one started here for as long as the block lasts. Of several processes
    each starts one, on a GPU of its own."""
    return open_tracker(config.tracker, first_gpu() or "auto")


def main(config: Config) -> None:
    check_training(config)
    if config.run.deterministic:
        use_deterministic_kernels()
    needs_tracker = weights_from(config.rewards).mask > 0 or config.run.evaluate_every > 0
    if config.tracker.endpoints and not needs_tracker and leads():
        print("tracker.endpoints will not be asked: rewards.mask and run.evaluate_every are 0", file=sys.stderr)
    with failing_together():
        # What is wrong with folder and data shows now, not when the policy is loaded.
        if leads():
            check_folder(config)
        ClipSource(config.data.train, config.data.train_split, config.data.weights, with_truth=True)
        if config.run.evaluate_every:
            ClipSource(config.data.test, config.data.test_split, with_truth=True)
        with tracker_client(config) if needs_tracker else nullcontext() as client:
            try:
                state = train(config, load_engine(config), client)
            except Interrupted as stopped:  # which is no failure: what has sent it starts the run again
                if leads():
                    print(f"revseg: stopped by SIGTERM; {stopped}", file=sys.stderr)
                return
        # Of several processes none has all parameters.
        known = parameter_digest(state.trained) if jax.process_count() == 1 else "spread over the processes"
    if leads():
        print(f"{config.run.dir}: step {int(state.step)} of {config.run.steps}, digest of the parameters {known}")


def train(config: Config, loaded: LoadedEngine, client: TrackerClient | None) -> TrainState:
    """Trains to `run.steps`, from the newest checkpoint of the run folder when there is one.

    On SIGTERM, or the first Ctrl-C of a single process, the current phase is finished, the rest of its step given up,
    and the last whole step saved; then this raises Interrupted or KeyboardInterrupt, which says how to go on.
    `loaded.trained` is taken over when no reference shares it, and is then gone.
    """
    check_training(config)
    if leads():
        check_folder(config)
    if config.learner.kl == "loss" and config.learner.kl_estimator == "k1" and leads():
        advice = "its gradient is 0 on average; use k2 or k3, or learner.kl=reward"
        print(f"revseg: warning: learner.kl_estimator=k1 in the loss regularises nothing: {advice}", file=sys.stderr)
    source = ClipSource(config.data.train, config.data.train_split, config.data.weights, with_truth=True)
    tracker = await_tracker(client, config.tracker.patience) if client else None
    made_of = source.fingerprints, loaded.folder, tracker
    open_run = partial(RunFolder, config, *made_of) if leads() else partial(RunFollower, config)
    alone = jax.process_count() == 1
    with heed_sigterm(ctrl_c=alone) as interruption, closing(open_run()) as run, telling_others():
        state = run_steps(config, loaded, client, source, run, interruption)
        stopped = agree(interruption.requested)
    if stopped:
        raise (KeyboardInterrupt if interruption.by_ctrl_c else Interrupted)(how_to_go_on(int(state.step), config))
    return state


def how_to_go_on(done: int, config: Config) -> str:
    """For whoever has stopped a run behind its step `done`."""
    if not done:
        return "no step was finished: the same command starts anew"
    if done < config.run.steps:
        return f"step {done} is saved: the same command goes on from there"
    return f"step {done}, the last, is saved"


def await_tracker(client: TrackerClient, patience: float) -> dict[str, Any]:
    """What the run's manifest says of the tracker, which is the same in all processes; all of them must call it.

    Sidecars that were started together with the run have `patience` seconds to come up. Raises SidecarAway, and
    InputError when the processes' sidecars have different models: their rewards would be mixed.
    """
    end, told = time.monotonic() + patience, False
    while True:
        try:
            found = description(client.info())
            break
        except SidecarAway as error:
            if time.monotonic() >= end:
                raise
            if leads() and not told:
                print(f"revseg: {error}; waiting for up to {patience:.0f} s", file=sys.stderr)
            told = True
            time.sleep(1.0)  # for one that fails at once
    first, *others = (known["tracker"] for known in gather(found))
    for process, other in enumerate(others, 1):
        if other["model"] != first["model"]:
            raise InputError(
                f"process {process} asks another tracker than process 0 ({other['checkpoint']} and "
                f"{first['checkpoint']}): give all processes sidecars with the same checkpoint and config"
            )
    return found


def run_steps(
    config: Config,
    loaded: LoadedEngine,
    client: TrackerClient | None,
    source: ClipSource,
    run: RunFolder | RunFollower,
    interruption: Interruption,
) -> TrainState:
    check_spread(loaded.placement, config)
    share = process_share(loaded.placement)
    steps = training_steps(
        source, config.chain, config.rollout.prompts_per_step, config.run.seed, *share, workers=config.data.workers
    )
    data = iter(steps)

    # ---- State: a fresh one, or the newest checkpoint's -------------------------------------------------------------
    learner = make_learner(
        loaded.engine.graphdef,
        config.learner,
        loaded.engine.encoder.layout,
        loaded.placement,
        config.rollout.temperature,
    )
    # The reference is the policy before any update. Updates donate their state, which a shared reference must survive.
    reference = store_reference(config.learner.reference, loaded.trained) if config.learner.kl != "off" else None
    state = learner.init(loaded.trained, donate=reference is not loaded.trained)
    if gather(run.resumes)[0]:  # the first process has checked the folder
        state, iterator = run.restore(state)
        data.set_state(iterator)
    run.checkpoints.prepare(state)
    run.scores.update(gather(run.scores)[0])  # by which all processes keep the same checkpoints
    place = partial(place_rows, loaded.placement)

    # ---- The loop -------------------------------------------------------------------------------------------------
    first = done = saved = int(state.step)
    failure: str | None = None
    position = data.get_state()  # behind the last whole step
    compilations, progress = Compilations(), Progress(first, config.run.steps, shown=leads())
    for step in range(first, config.run.steps + 1):
        try:
            # What it gives up is made up for at the next start. Of several processes none can stop without the others.
            with interruption.at_once() if jax.process_count() == 1 else nullcontext():
                evaluate_when_due(config, loaded, client, state, step, run)
        except SidecarAway as error:
            failure = str(error)
            break
        except Interrupted:
            break
        if step == config.run.steps:
            break

        clock = Clock()
        batch: Batch = next(data)
        clock.lap("data")

        weights = loaded.engine.weights((state.trained, loaded.frozen))
        sample = partial(sample_groups, config, loaded.engine, weights, client, step)
        groups, replaced = sample(batch), 0
        clock.lap("rollout")
        if config.rollout.resample_limit:
            try:
                groups, replaced = replace_groups_without_spread(
                    config, loaded.placement, groups, data, sample, clock.lap
                )
            except SidecarAway as error:
                failure = str(error)
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
            failure = str(error)
        clock.lap("reward_wait")
        failure = agree(failure)
        if failure or agree(interruption.requested):
            break
        rewards = same_in_share(loaded.placement, rewards)

        by_turn = np.array([[(reward.turn1, reward.turn2) for reward in row] for row in rewards])
        # grpo's advantages are made on the host, ppo's on the devices.
        given = place(by_turn.astype(np.float32)) if config.learner.algorithm == "ppo" else by_turn
        experience = make_experience(config.learner, learner.layout, rollouts, scores, given)
        state, metrics = learner.update(state, loaded.frozen, place(experience))
        metrics = {f"learner/{name}": float(value) for name, value in metrics.items()}
        metrics["learner/bad_steps"] = int(state.bad_steps)
        clock.lap("update")

        metrics |= mean_over_shares(
            loaded.placement, reward_metrics(rewards, config.learner.credit) | rollout_metrics(groups)
        )
        flops = update_flops(loaded.engine.encoder.model, config.learner, groups.rollouts)
        *counts, decoded = zip(*gather_shares(loaded.placement, (replaced, flops, groups.decoded)), strict=True)
        metrics["rollout/groups_replaced"], flops = map(sum, counts)
        tokens = sum(part.tokens for share in decoded for part in share)
        metrics["rollout/wasted_decode_steps"] = 1 - tokens / decode_steps(decoded)
        metrics |= speed_metrics(clock.seconds, tokens, flops, compilations.since_last())
        for gap in ("logprob_gap", "logprob_gap_mean"):
            metrics[f"rollout/{gap}"] = metrics.pop(f"learner/{gap}")
        done, position = step + 1, data.get_state()
        run.log(done, metrics, step_digests(loaded.placement, groups, rewards, metrics))
        progress.show(done, metrics)
        if config.run.traces_every and (done % config.run.traces_every == 0 or done == 1):
            records = gather_shares(loaded.placement, list(step_traces(loaded.engine.encoder, groups, rewards, done)))
            run.write_traces(f"step_{done:06d}", (record for part in records for record in part))
        if done % config.run.checkpoint_every == 0 or done == config.run.steps or evaluation_due(config, done):
            run.checkpoints.save(done, state, position)
            saved = done
        if metrics["learner/bad_steps"] >= config.learner.max_bad_steps:
            path = run.write_bad_batch(done, groups.rollouts._asdict() | {"rewards": by_turn})
            failure = f"{int(state.bad_steps)} steps in a row had a loss or gradient that is not finite"
            failure += f" (the last one's batch: {path})"
            break
        if agree(interruption.requested):
            break
    progress.close()
    if done > saved:
        run.checkpoints.save(done, state, position)
    if failure:
        raise RunFailure(f"{failure}; step {done} is saved, the same command goes on from there")
    return state


def step_digests(
    placement: Placement, groups: Groups, rewards: list[list[RolloutReward]], metrics: dict[str, float]
) -> dict[str, str]:
    """One digest for each of `revseg_jax.run.digests.STAGES`. Those of data, tokens and rewards are made of the rows'
    digests, so that they mean the same for any number of processes."""
    batch, rollouts = groups.batch, groups.rollouts

    def of_row(b: int) -> dict[str, str]:
        return {
            "data": digest([batch.index[b], batch.video_id[b], batch.query[b], batch.frames[b]]),
            "tokens": digest([rollouts.tokens[b], rollouts.mask[b]]),
            "rewards": digest([rewards[b]]),
        }

    with ThreadPoolExecutor(cores()) as pool:  # hashing lets go of the GIL
        rows = list(pool.map(of_row, range(len(rewards))))
    everything = [row for part in gather_shares(placement, rows) for row in part]
    found = {stage: digest(row[stage] for row in everything) for stage in rows[0]}
    update = {name: value for name, value in metrics.items() if name.startswith("learner/")}
    return found | {"update": digest([sorted(update.items())])}


def step_traces(encoder: PromptEncoder, groups: Groups, rewards, step: int) -> Iterator[dict[str, Any]]:
    for b, (row, earned) in enumerate(zip(groups.chains, rewards, strict=True)):
        for sample, (rollout, reward) in enumerate(zip(row, earned, strict=True)):
            yield trace_record(encoder, groups.batch, b, sample, rollout, reward, step)
