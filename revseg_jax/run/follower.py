"""The run folder as the processes see it that do not lead: the same checkpoints, no logs."""

from __future__ import annotations

from typing import Any

from revseg_jax.config import Config
from revseg_jax.paths import path_of
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest


class RunFollower:
    """What `RunFolder` is to the first process of a run; that one alone checks, locks and writes."""

    def __init__(self, config: Config):
        self.scores: dict[int, float] = {}  # as in RunFolder
        kept = NewestAndBest(config.run.keep_checkpoints, config.run.keep_best, self.scores)
        self.checkpoints = Checkpoints(path_of(config.run.dir) / "checkpoints", kept)
        self.resumes = self.checkpoints.latest_step() is not None

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        _, state, iterator = self.checkpoints.restore(state)
        return state, iterator

    def log(self, *_: Any) -> None: ...

    def log_evaluation(self, step: int, record: dict[str, Any], _: Any) -> None:
        self.scores[step] = record["jf"]

    def write_traces(self, *_: Any) -> None: ...

    def write_bad_batch(self, *_: Any) -> None: ...

    def close(self) -> None:
        self.checkpoints.close()
