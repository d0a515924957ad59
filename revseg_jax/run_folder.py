"""A run's folder: what is written where, and how a run goes on after it was stopped.

config.yaml  run.json  metrics.jsonl  digests.jsonl  evaluation.jsonl  tensorboard/  checkpoints/  traces/  report.html
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
from tensorboardX import SummaryWriter

from revseg_jax.checkpoints import Checkpoints
from revseg_jax.config import Config, load_config, to_yaml
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.mirror import Mirror

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

# What a continued run may have otherwise: how long and how often, where it is, and how it reaches its sidecars.
MAY_CHANGE = frozenset(
    """
    run.dir run.steps run.checkpoint_every run.keep_checkpoints run.traces_every
    tracker.endpoints tracker.deadline_seconds tracker.patience tracker.token_file
    tracker.tls_ca tracker.tls_certificate tracker.tls_key
    """.split()
)


class RunFolder:
    """Opens `config.run.dir` for a training run, new or resumed.

    A resumed run must have the same config but for what `MAY_CHANGE` names. Raises InputError when it has another one,
    or when another process trains in the folder; RunFailure when the folder cannot be written.
    """

    def __init__(self, config: Config, fingerprints: list[str]):
        self._mirror = Mirror(config.run.dir)
        self.path = self._mirror.local
        try:
            for name in ("traces", "checkpoints"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._mirror.pull()
            folder = self._mirror.folder / "checkpoints"
            self.checkpoints = Checkpoints(folder, config.run.keep_checkpoints, before_save=self._mirror.push)
            self.resumes = self.checkpoints.latest_step() is not None
            if self.resumes:
                self._check_same(config)
            else:
                self._forget_after(0)
            (self.path / "config.yaml").write_text(to_yaml(config))
            (self.path / "run.json").write_text(json.dumps(manifest(config, fingerprints), indent=2) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None
        self._tensorboard: SummaryWriter | None = None

    def _take_lock(self) -> IO[str]:
        """The operating system lets go of it when the process ends, however it ends."""
        file = open(self.path / "lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {self.path}: wait for it or choose another run.dir"
            ) from None
        return file

    def _unwritable(self, error: OSError) -> RunFailure:
        return RunFailure(f"cannot write the run folder {self.path}: {error.strerror or error}")

    def _check_same(self, config: Config) -> None:
        old, new = (_settings(c) for c in (load_config(self.path / "config.yaml"), config))
        changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
        if changed:
            raise InputError(
                f"{self.path} holds a run with another config ({'; '.join(changed[:3])}): choose another run.dir"
            )

    def _forget_after(self, step: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from: those steps are taken again."""
        for name in ("metrics.jsonl", "digests.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                path.write_text("".join(f"{line}\n" for line in kept))
        for path in (self.path / "traces").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def log(self, step: int, metrics: dict[str, float], digests: dict[str, str]) -> None:
        """One line of metrics.jsonl and one of digests.jsonl. Raises RunFailure when they cannot be written."""
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        try:
            for name, row in (("metrics", {"time": time.time(), **metrics}), ("digests", digests)):
                with open(self.path / f"{name}.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_traces(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            (self.path / "traces" / f"{name}.jsonl").write_text(lines)
        except OSError as error:
            raise self._unwritable(error) from None

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, iterator state) of the newest sound checkpoint, placed like `state`; later log lines are dropped."""
        step, state, iterator = self.checkpoints.restore(state)
        self._forget_after(step)
        return state, iterator

    def close(self) -> None:
        """Waits for the last checkpoint and lets go of the folder."""
        try:
            self.checkpoints.close()
        finally:
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._lock.close()
        self._mirror.push()


def _settings(config: Config) -> dict[str, str]:
    """Every field that may not change between a run and its continuation, by its dotted name."""

    def flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", str(value)

    return {key: value for key, value in flatten(dataclasses.asdict(config), "") if key not in MAY_CHANGE}


def _step_of(line: str) -> float:
    """A line that was cut off by a crash counts as belonging to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


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
