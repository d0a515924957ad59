"""How far a run is: a line that follows it on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

SHOWN = ("total", "format", "temporal", "spatial", "mask")  # rewards
LINES = 20  # about as many, where stderr is no terminal


class Progress:
    """Of the steps after `first`, up to `steps`. shown: False for a process that does not lead its run."""

    def __init__(self, first: int, steps: int, shown: bool = True):
        self._shown = shown
        self._first, self._steps, self._begin = first, steps, time.monotonic()
        self._every = max(steps // LINES, 1)
        # The time left follows from the last steps: the first one compiles.
        self._bar = tqdm(
            initial=first,
            total=steps,
            desc="train",
            unit="step",
            disable=not shown or None,
            smoothing=0.3,
            dynamic_ncols=True,
        )

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each step, with its metrics."""
        rewards = {name: f"{metrics[f'reward/{name}']:.2f}" for name in SHOWN}
        if not self._bar.disable:
            self._bar.set_postfix(rewards, refresh=False)
            self._bar.update()
        elif self._shown and (step % self._every == 0 or step in (self._first + 1, self._steps)):
            pace = (time.monotonic() - self._begin) / (step - self._first)
            words = ", ".join(f"{name} {value}" for name, value in rewards.items())
            left = pace * (self._steps - step) / 60
            print(f"step {step} of {self._steps}: {words}; {pace:.1f} s a step, {left:.0f} min left", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
