"""A training step in numbers: rewards, answers, failures, speed, memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from revseg_jax.evaluation.chains import failure_cause
from revseg_jax.groups import Decoded, Groups, have_spread
from revseg_jax.learner.flops import peak_flops
from revseg_jax.rewards.total import RolloutReward
from revseg_jax.rollout.chains import Rollout

GIB = 2**30


class Clock:
    """Splits a step's wall time into named phases; one may come several times."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{name}"] = self.seconds.get(f"seconds/{name}", 0.0) + now - self._last
        self._last = now


class Compilations:
    """Counts the programs that JAX builds, or reads from its cache, while the run goes on."""

    def __init__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def since_last(self) -> int:
        count, self._count = self._count, 0
        return count


def reward_metrics(rewards: Sequence[Sequence[RolloutReward]], credit: str) -> dict[str, float]:
    """Means over all rollouts of a step, and the share of groups without spread as dynamic sampling judges them.

    credit: `learner.credit`.
    """
    flat = [reward for row in rewards for reward in row]
    names = ("total", "format", "temporal", "spatial", "mask", "overlong")
    return {f"reward/{name}": float(np.mean([getattr(reward, name) for reward in flat])) for name in names} | {
        "reward/groups_without_spread": float(np.mean(~have_spread(rewards, credit))),
        "rollout/turns": float(np.mean([reward.turns for reward in flat])),
    }


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """Lengths in tokens and shares, over all rollouts; `truncated_count` is a number of rollouts, `tokens_turn2` 0 for
    those without a second turn."""
    chains = [chain for row in groups.chains for chain in row]
    rollouts = groups.rollouts
    real, slots = rollouts.prefix_mask.sum() + rollouts.mask.sum(), rollouts.prefix_mask.size + rollouts.mask.size
    return {
        "rollout/tokens": float(np.mean([chain.tokens for chain in chains])),
        "rollout/tokens_longest": max(chain.tokens for chain in chains),
        "rollout/tokens_turn1": float(np.mean([chain.tokens1 for chain in chains])),
        "rollout/tokens_turn2": float(np.mean([chain.tokens2 for chain in chains])),
        "rollout/truncated": float(np.mean([chain.truncated for chain in chains])),
        "rollout/truncated_count": sum(chain.truncated for chain in chains),
        "rollout/padding": 1 - float(real / slots),
    } | failure_metrics(chains)


def decode_steps(shares: Sequence[Sequence[Decoded]]) -> int:
    """Steps of the decoding loops times the rollouts that were in them, ended ones included.

    A loop runs, in all processes together, until the longest answer of all has ended, and one step more to put its last
    token into the cache. shares: of each process's share of the prompts, what it decoded.
    """
    steps = 0
    for together in zip(*shares, strict=True):
        longest = map(max, zip(*(part.longest for part in together), strict=True))
        steps += sum(part.rollouts for part in together) * sum(tokens + 1 for tokens in longest if tokens)
    return steps


def failure_metrics(chains: Sequence[Rollout]) -> dict[str, float]:
    """Shares of all rollouts: `failures/any`, and one for each cause that occurred."""
    causes = Counter(cause for chain in chains if (cause := failure_cause(chain)))
    names = {cause: re.sub(r"\W+", "_", cause).strip("_") for cause in causes}
    shares = {f"failures/{names[cause]}": count / len(chains) for cause, count in sorted(causes.items())}
    return {"failures/any": sum(shares.values())} | shares


def speed_metrics(
    seconds: dict[str, float], generated: int, update_flops: float, compilations: int
) -> dict[str, float]:
    """The step's phases and what follows from them.

    seconds: of the phases, by name; generated: tokens sampled in the step; update_flops: as counted by
    `learner.flops`. `speed/mfu` is of the update and only there for devices whose peak is known.
    """
    total = sum(seconds.values())
    flops = update_flops / (seconds["seconds/update"] * jax.device_count())  # a second and device
    metrics = seconds | {
        "reward/wait_fraction": seconds["seconds/reward_wait"] / total,
        "data/wait_fraction": seconds["seconds/data"] / total,
        "speed/tokens_per_second": generated / total,
        "speed/update_tflops_per_device": flops / 1e12,
        "speed/compilations": compilations,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    return metrics | ({"speed/mfu": flops / peak} if peak else {}) | memory_metrics()


def memory_metrics() -> dict[str, float]:
    """Peaks since the process began: of this process's memory and, where JAX knows it, of its fullest device."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    metrics = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return metrics | ({"memory/device_gib": max(peaks) / GIB} if peaks else {})
