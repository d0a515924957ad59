"""A run's folder: what is written where, and how a run goes on after it was stopped.

config.yaml  run.json  metrics.jsonl  evaluation.jsonl  tensorboard/  checkpoints/  traces/  report.html
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

from revseg_jax.config import Config, to_yaml
from revseg_jax.errors import InputError, RunFailure

PACKAGES = (
    "revseg-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "torch",
    "sam2",
)


class RunFolder:
    """Opens `config.run.dir` for a training run, new or resumed.

    A resumed run must have the same config but for `run.steps` and the checkpoint settings. Raises InputError when it
    has another one, RunFailure when the folder cannot be written.
    """

    def __init__(self, config: Config, fingerprints: list[str]):
        self.path = Path(config.run.dir)
        try:
            for name in ("traces", "checkpoints"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=config.run.keep_checkpoints, create=True)
            self.checkpoints = ocp.CheckpointManager((self.path / "checkpoints").absolute(), options=options)
            self.resumed_step = self.checkpoints.latest_step()
            if self.resumed_step is not None:
                self._check_same(config)
            else:
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
            (self.path / "config.yaml").write_text(to_yaml(config))
            (self.path / "run.json").write_text(json.dumps(manifest(config, fingerprints), indent=2) + "\n")
            self._forget_after(self.resumed_step or 0)
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=(self.resumed_step or 0) + 1)
        except OSError as error:
            raise RunFailure(f"cannot write the run folder {self.path}: {error.strerror or error}") from None

    def _check_same(self, config: Config) -> None:
        old = (self.path / "config.yaml").read_text()
        free = {"steps", "checkpoint_every", "keep_checkpoints", "traces_every", "dir"}
        comparable = [
            [line for line in text.splitlines() if line.strip().split(":")[0] not in free]
            for text in (old, to_yaml(config))
        ]
        changed = [f"{a.strip()} -> {b.strip()}" for a, b in zip(*comparable, strict=False) if a != b]
        if changed or len(comparable[0]) != len(comparable[1]):
            raise InputError(
                f"{self.path} holds a run with another config ({'; '.join(changed[:3])}): choose another run.dir"
            )

    def _forget_after(self, step: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from: those steps are taken again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            path.write_text("".join(f"{line}\n" for line in kept))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_traces(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.path / "traces" / f"{name}.jsonl").write_text(lines)

    def save(self, step: int, state: Any, iterator: dict[str, Any]) -> None:
        """Writes a checkpoint in the background: the train state's arrays and Grain's iterator state."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(iterator))
        self.checkpoints.save(step, args=items)

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, iterator state) of the newest checkpoint, placed like `state`."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self.checkpoints.restore(self.resumed_step, args=items)
        return restored.state, restored.data

    def close(self) -> None:
        self.checkpoints.wait_until_finished()
        self.checkpoints.close()
        self._tensorboard.close()


def manifest(config: Config, fingerprints: list[str]) -> dict[str, Any]:
    """What a run was made of: the content of run.json."""
    return {
        "command": sys.argv,
        "seed": config.run.seed,
        "config": dataclasses.asdict(config),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "data_fingerprints": fingerprints,
        "git": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    """Revision of the checkout the package runs from, and whether it was clean; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return None
