"""The groups of a training step: rollouts whose rewards are on their way; those that would teach nothing replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from revseg_jax.config import Config
from revseg_jax.data.example import Batch, Example, stack
from revseg_jax.learner.advantages import groups_with_spread
from revseg_jax.parallel.processes import agree
from revseg_jax.parallel.rows import same_in_share
from revseg_jax.parallel.sharding import Placement
from revseg_jax.rewards.scoring import PendingRewards, collect_rewards, request_rewards
from revseg_jax.rewards.total import RolloutReward
from revseg_jax.rollout.batch import RolloutBatch, join
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.engine import RolloutEngine
from revseg_jax.rollout.loading import prompts_of
from revseg_jax.rollout.sampling import rollout_keys
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.tracker.connection import SidecarAway


class Decoded(NamedTuple):
    """What went through the two decoding loops together, of one process: how many rollouts, the tokens of the longest
    first and second answer among them, and all their tokens."""

    rollouts: int
    longest: tuple[int, int]
    tokens: int


class Groups(NamedTuple):
    """Attributes:
    batch: the B examples
    rollouts: [B, G], on the host
    pending: [B], their rewards
    decoded: what was sampled together, batch by batch, with what has been replaced since
    """

    batch: Batch
    rollouts: RolloutBatch
    pending: list[PendingRewards]
    decoded: list[Decoded]

    @property
    def chains(self) -> list[Sequence[Rollout]]:
        return [waiting.chains for waiting in self.pending]

    def rewards(self, config: Config) -> list[list[RolloutReward]]:
        """[B][G]; waits for the sidecar."""
        return [
            collect_rewards(config.rewards, config.chain, self.batch, row, waiting)
            for row, waiting in enumerate(self.pending)
        ]


def sample_groups(
    config: Config, engine: RolloutEngine, params: Any, client: TrackerClient | None, step: int, batch: Batch
) -> Groups:
    """Rollouts in parts, so that the sidecar scores one part while the next is being sampled; prompts that are likely
    to be answered at similar length share a part. params: (trained, frozen) ones of the policy."""
    keys = rollout_keys(config.run.seed, step, batch.index, config.rollout.group_size)
    prompts_per_step = config.rollout.prompts_per_step
    # Of several processes each has its share of every part.
    size = len(batch) * (config.rollout.prompts_per_batch or prompts_per_step) // prompts_per_step
    prompts, order, parts, decoded = prompts_of(batch), by_length(batch), [], []
    together = [order[begin : begin + size] for begin in range(0, len(batch), size)]
    pending: dict[int, PendingRewards] = {}
    for rows in together:
        arrays, chains = engine.sample(params, [prompts[row] for row in rows], keys[rows])
        parts.append(arrays)
        for row, group in zip(rows.tolist(), chains, strict=True):
            pending[row] = request_rewards(client, config.rewards, batch, row, group)
        flat = [chain for row in chains for chain in row]
        longest = max(chain.tokens1 for chain in flat), max(chain.tokens2 for chain in flat)
        decoded.append(Decoded(len(flat), longest, sum(chain.tokens for chain in flat)))
    return Groups(batch, join(parts, together), [pending[row] for row in range(len(batch))], decoded)


def by_length(batch: Batch) -> np.ndarray:
    """The rows of a batch, int [B], from the answers that are likely to be short to those likely to be long.

    All that is known before a policy writes: how much it is shown, which it may go through one by one, and how much it
    is asked. Images and short videos among long ones then do not wait for these.
    """
    return np.lexsort(([len(query) for query in batch.query], batch.frame_count))


def replace_groups_without_spread(
    config: Config,
    placement: Placement,
    first: Groups,
    batches: Iterator[Batch],
    sample: Callable[[Batch], Groups],
    lap: Callable[[str], None],
) -> tuple[Groups, int]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing about the task (`have_spread`)
    give their places to the first groups of further batches that do.

    At most `rollout.resample_limit` batches are taken; what is then still missing stays as it was. Of several processes
    each replaces groups of its own share, and all draw until none lacks any: they sample, and read their data,
    together. lap: is told what the time since the last call went to. Returns the groups and how many were replaced.
    Raises SidecarAway, in all processes, when one lost its sidecar.
    """
    drawn, wanted = [first], len(first.batch)
    useful = [(0, row) for row in _with_spread(first, config, placement)]
    lap("reward_wait")
    while len(drawn) <= config.rollout.resample_limit and agree(len(useful) < wanted):
        batch = next(batches)
        lap("data")
        drawn.append(sample(batch))
        lap("rollout")
        useful += [(len(drawn) - 1, row) for row in _with_spread(drawn[-1], config, placement)]
        lap("reward_wait")
    chosen = useful[:wanted]
    chosen = sorted(chosen + [(0, row) for row in range(wanted) if (0, row) not in chosen][: wanted - len(chosen)])
    decoded = [part for groups in drawn for part in groups.decoded]
    if all(number == 0 for number, _ in chosen):
        return first._replace(decoded=decoded), 0
    columns = zip(*(groups.rollouts for groups in drawn), strict=True)
    groups = Groups(
        batch=stack([_example(drawn[number].batch, row) for number, row in chosen]),
        rollouts=RolloutBatch(*(np.stack([column[number][row] for number, row in chosen]) for column in columns)),
        pending=[drawn[number].pending[row] for number, row in chosen],
        decoded=decoded,
    )
    return groups, sum(number > 0 for number, _ in chosen)


def _with_spread(groups: Groups, config: Config, placement: Placement) -> list[int]:
    """The rows that teach something."""
    away, rewards = None, []
    try:
        rewards = groups.rewards(config)
    except SidecarAway as error:
        away = str(error)
    if away := agree(away):
        raise SidecarAway(away)
    spread = have_spread(same_in_share(placement, rewards), config.learner.credit)
    return np.flatnonzero(spread).tolist()


def have_spread(rewards: Sequence[Sequence[RolloutReward]], credit: str) -> np.ndarray:
    """bool [B], in which groups the task's rewards differ (with credit=turn: those to go, in either turn): where they
    are equal GRPO has no advantage. Overlong penalties are left out, as DAPO compares which answers are right: they
    would give a group an advantage that is about length alone."""
    earned = np.array([[(reward.task1, reward.task2) for reward in row] for row in rewards])
    second = np.array([[reward.turns == 2 for reward in row] for row in rewards])
    return groups_with_spread(earned, second, credit)


def _example(batch: Batch, row: int) -> Example:
    return Example(**{field.name: getattr(batch, field.name)[row] for field in fields(Example)})
