"""A run's folder: what is written where, and how a run goes on after it was stopped.

config.yaml  run.json  metrics.jsonl  digests.jsonl  evaluation.jsonl  tensorboard/  checkpoints/  traces/  report.html
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from revseg_jax.config import Config, load_config, to_yaml
from revseg_jax.data.prepared import MARKER
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.paths import AnyPath, is_remote, path_of, take_lock, write_whole
from revseg_jax.run.checkpoints import Checkpoints, NewestAndBest, holds_checkpoint
from revseg_jax.run.manifest import changed_conditions, manifest, other_inputs, with_known_tracker
from revseg_jax.run.metrics_writer import MetricsWriter, append_line
from revseg_jax.run.mirror import Mirror

# What a continued run may have otherwise: what run.json compares by its content, how long and how often, where it is
# and on which devices, and how it reaches its sidecars. Only the mesh and what is computed together, or again, may
# change the bits, and those by rounding alone.
MAY_CHANGE = frozenset(
    """
    data.train tracker.checkpoint tracker.config
    run.dir run.steps run.checkpoint_every run.keep_checkpoints run.keep_best run.traces_every run.evaluate_every
    run.wandb rollout.prompts_per_batch policy.remat learner.prompts_per_microbatch learner.logprob_chunk
    learner.max_bad_steps data.workers
    tracker.endpoints tracker.deadline_seconds tracker.patience tracker.token_file
    tracker.tls_ca tracker.tls_certificate tracker.tls_key
    """.split()
)
EVALUATED = ("data.test", "data.test_split", "data.test_clips")  # may change until they have been evaluated


class RunFolder:
    """Opens `config.run.dir` for a training run, new or resumed.

    A resumed run must have the same data, start policy, tracker and config but for what `MAY_CHANGE` names. Raises
    InputError when it has others, when its checkpoints are gone, or when another process trains in the folder;
    RunFailure when the folder cannot be written.
    """

    def __init__(self, config: Config, fingerprints: list[str], policy: Path, tracker: dict[str, Any] | None = None):
        """fingerprints: of the training data; policy: the folder of the policy that the run starts from; tracker: what
        `revseg_jax.tracker.client.description` says of the one that is asked, if one is."""
        self._mirror = Mirror(config.run.dir)
        self.path = self._mirror.local
        try:
            for name in ("traces", "checkpoints"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            refusal = f"another process is training in {self.path}: wait for it or choose another run.dir"
            self._lock = take_lock(self.path / "lock", refusal)
            self._mirror.pull()
            self.scores: dict[int, float] = {}  # J&F of the evaluations of this run so far, by step
            kept = NewestAndBest(config.run.keep_checkpoints, config.run.keep_best, self.scores)
            folder = self._mirror.folder / "checkpoints"
            self.checkpoints = Checkpoints(folder, kept, before_save=self._mirror.push)
            self.resumes = self.checkpoints.latest_step() is not None
            conditions = manifest(config, fingerprints, policy, tracker)
            before = self._last_start()
            if self.resumes:
                check_same_settings(self.path, config)
                conditions = with_known_tracker(before, conditions)
                conditions["earlier_starts"] = self._earlier_starts(before, conditions)
            else:
                self._check_never_saved(before)
                self._forget_after(-1)
            write_whole(self.path / "config.yaml", to_yaml(config))
            write_whole(self.path / "run.json", json.dumps(conditions, indent=2) + "\n")
            self._writer = MetricsWriter(self.path, config.run.wandb, dataclasses.asdict(config))
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> RunFailure:
        return RunFailure(f"cannot write the run folder {self.path}: {error.strerror or error}")

    def _last_start(self) -> dict[str, Any]:
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _earlier_starts(self, before: dict[str, Any], conditions: dict[str, Any]) -> list[dict[str, Any]]:
        """What run.json said at each start before this one, without the config. Raises InputError for other data,
        another start policy, which is also the reference, or another tracker.

        before, conditions: what it says of the last start and of this one.
        """
        if others := other_inputs(before, conditions):
            raise InputError(f"{self.path} holds a run with {', '.join(others)}: choose another run.dir")
        for difference in changed_conditions(before, conditions):
            print(f"revseg: warning: the run goes on with {difference}; that may change its bits", file=sys.stderr)
        last = {name: value for name, value in before.items() if name not in ("config", "earlier_starts")}
        return [*before.get("earlier_starts", []), *([last] if last else [])]

    def _check_never_saved(self, before: dict[str, Any]) -> None:
        """Raises InputError when this run, which has no checkpoint, once had one: a new start would erase its logs. A
        run that was killed before its first checkpoint was whole does start anew.

        before: what run.json says of the last start.
        """
        damaged = self.checkpoints.damaged_steps()
        went_on = "earlier_starts" in before
        steps = [record["step"] for record in read_records(self.path / "metrics.jsonl")]
        every = before["config"]["run"]["checkpoint_every"] if "config" in before else math.inf
        # A second checkpoint is not begun before the first is whole.
        if damaged or went_on or max(steps, default=0) > 2 * every:
            back = f"move {damaged[-1]} from damaged/ back into checkpoints/, " if damaged else ""
            raise InputError(
                f"{self._mirror.folder} holds a run whose checkpoints are gone: repair the storage, {back}"
                "choose another run.dir, or delete the folder to start anew"
            )

    def _forget_after(self, step: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from: those steps are taken again.

        Evaluations with a label were not made by the training loop; they stay.
        """
        for name in ("metrics.jsonl", "digests.jsonl", "evaluation.jsonl"):
            path = self.path / name
            if path.exists():
                text = path.read_text()
                records = [(line, _record(line)) for line in text.splitlines()]
                kept = [line for line, record in records if record and ("label" in record or record["step"] <= step)]
                whole = "".join(f"{line}\n" for line in kept)
                if whole != text:  # a last line may also lack its end
                    write_whole(path, whole)
        for path in (self.path / "traces").glob("*_*.jsonl"):
            number = path.stem.rpartition("_")[2]
            if number.isdecimal() and int(number) > step:
                path.unlink()
        self.scores.clear()
        self.scores |= evaluation_scores(self.path)

    def log(self, step: int, metrics: dict[str, float], digests: dict[str, str]) -> None:
        """One line of metrics.jsonl and one of digests.jsonl. Raises RunFailure when they cannot be written."""
        try:
            self._writer.write(step, metrics)
            append_line(self.path / "digests.jsonl", {"step": step, **digests})
        except OSError as error:
            raise self._unwritable(error) from None

    def log_evaluation(self, step: int, record: Mapping[str, Any], traces: Iterable[dict[str, Any]]) -> None:
        """Writes the traces, then one line of evaluation.jsonl: with it the evaluation is done. `record` needs `jf`."""
        self.write_traces(f"eval_{step:06d}", traces)
        try:
            append_line(self.path / "evaluation.jsonl", {"step": step, **record})
        except OSError as error:
            raise self._unwritable(error) from None
        self.scores[step] = record["jf"]
        numbers = {f"evaluation/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        self._writer.show(step, numbers)

    def write_bad_batch(self, step: int, arrays: Mapping[str, Any]) -> Path:
        """Saves arrays for inspection; returns where."""
        path = self.path / f"bad_batch_{step:06d}.npz"
        try:
            np.savez_compressed(path, **arrays)
        except OSError as error:
            raise self._unwritable(error) from None
        return path

    def write_traces(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            write_whole(self.path / "traces" / f"{name}.jsonl", lines)
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
            self._writer.close()
            self._lock.close()
        self._mirror.push()


def check_folder(config: Config) -> None:
    """Raises InputError for what shows before the policy is loaded: `config.run.dir` is a prepared dataset, or holds a
    run with checkpoints that has another config."""
    folder = path_of(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir={config.run.dir} is a file: choose a folder")
    if (folder / MARKER).exists():
        raise InputError(f"run.dir={config.run.dir} is a prepared dataset: choose another folder for the run")
    if holds_checkpoint(folder / "checkpoints") and (folder / "config.yaml").exists():
        check_same_settings(folder, config)


def check_same_settings(folder: AnyPath, config: Config) -> None:
    """Raises InputError when the run in `folder` has another config, but for what `MAY_CHANGE` names."""
    old, new = (_settings(c) for c in (load_config(folder / "config.yaml"), config))
    free = () if evaluation_scores(folder) else EVALUATED
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key] and key not in free]
    if changed:
        raise InputError(f"{folder} holds a run with another config ({'; '.join(changed[:3])}): choose another run.dir")


def evaluation_scores(folder: AnyPath) -> dict[int, float]:
    """J&F of the evaluations that a run has recorded, by step."""
    return {record["step"]: record["jf"] for record in read_records(folder / "evaluation.jsonl")}


def read_records(path: AnyPath) -> list[dict[str, Any]]:
    """What a run has logged in a .jsonl file, without a line that a crash cut off; nothing when there is no file."""
    records = map(_record, path.read_text().splitlines()) if path.exists() else ()
    return [record for record in records if record]


def _settings(config: Config) -> dict[str, str]:
    """Every field that may not change between a run and its continuation, by its dotted name."""

    def flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", str(value)

    def place(name: str) -> str:
        return name if is_remote(name) or name == "embedded" else os.path.realpath(name)

    data = dataclasses.replace(config.data, test=list(map(place, config.data.test)))
    policy = dataclasses.replace(config.policy, path=place(config.policy.path))
    config = dataclasses.replace(config, data=data, policy=policy)

    settings = flatten(dataclasses.asdict(config), "")
    return {key: value for key, value in settings if key not in MAY_CHANGE and not key.startswith("mesh.")}


def _record(line: str) -> dict[str, Any] | None:
    """None for a line that a crash cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
