"""Where a run's numbers go: metrics.jsonl, TensorBoard and, when asked for, Weights & Biases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError


class MetricsWriter:
    """Writes into a run folder; TensorBoard's files appear with the first numbers."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        """project: the name of a Weights & Biases project, "" for none; settings: shown there as the run's config.

        Raises InputError when a project is given and the wandb package is not installed.
        """
        self._folder = folder
        self._tensorboard: Any = None
        self._wandb = _wandb_run(folder, project, settings) if project else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, in which what is not finite is null, and the same numbers in the other places.

        Raises OSError when the file cannot be written.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_line(self._folder / "metrics.jsonl", {"step": step, "time": time.time(), **finite})
        self.show(step, metrics)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """To TensorBoard and Weights & Biases only."""
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter  # imports torch, which takes seconds

            self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def _wandb_run(folder: Path, project: str, settings: Mapping[str, Any]) -> Any:
    """A new run of the project, or the one that this folder had before."""
    try:
        import wandb
    except ImportError:
        raise InputError("run.wandb needs the wandb package: pip install 'revseg-jax[wandb]'") from None
    name = folder / "wandb_id"
    known = name.read_text().strip() if name.exists() else None
    run = wandb.init(project=project, id=known, resume="allow", dir=str(folder), config=dict(settings))
    name.write_text(run.id + "\n")
    return run
