"""`revseg evaluate`: a policy on the benchmarks. Read it from top to bottom."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revseg_jax.config import Config
from revseg_jax.data.prepared import read_prepared
from revseg_jax.errors import InputError
from revseg_jax.evaluation.benchmarks import BENCHMARKS, find_data, left_out
from revseg_jax.evaluation.predict import PREDICTIONS, predict
from revseg_jax.evaluation.protocols import Row, rows_of
from revseg_jax.evaluation.scoring import score_benchmark
from revseg_jax.evaluation.submission import write_submission
from revseg_jax.evaluation.table import markdown, terminal
from revseg_jax.paths import local_only, take_lock, write_whole
from revseg_jax.policy.checkpoint import policy_digest
from revseg_jax.rollout.loading import load_engine
from revseg_jax.train import tracker_client

SETTINGS, RESULTS, LOCK = "settings.json", "results.json", "lock"


def main(config: Config, benchmarks: Sequence[str], out: str, sampled: bool = False, workers: int = 0) -> list[Row]:
    """Runs `policy.path` on the benchmarks whose prepared folders are in `data.test`, or lie in folders named there.

    benchmarks: names, or ["all"] for all whose data is there. sampled: draws answers as `rollout.*` says instead of
    taking the likeliest tokens. Writes <out>/<benchmark>/{predictions,chains.jsonl[,submission.zip]}, results.json and
    results.md; a second call goes on where the first was stopped. workers: processes that score, 0 takes all cores.
    """
    data = find_data(list(config.data.test), list(benchmarks))
    folder = local_only(out)
    failures = _predict_all(config, data, folder, sampled)

    rows: list[Row] = []
    for name, path in data.items():
        benchmark, predictions = BENCHMARKS[name], folder / name / PREDICTIONS
        prepared, lacking = read_prepared(path), left_out(path, benchmark.split)
        if benchmark.server is not None and not lacking:
            write_submission(benchmark, path, predictions, folder / name / "submission.zip")
        if prepared["truth"][benchmark.split]:
            rows += rows_of(benchmark, score_benchmark(benchmark, path, predictions, workers), lacking)
        else:
            asked = prepared["summary"][benchmark.split]["expressions"]
            note = f"no zip for the server: {lacking}" if lacking else f"a server scores {name}/submission.zip"
            rows.append(Row(benchmark.title, None, None, None, note, asked, 0, {}))
    _write_results(folder, rows, failures)
    print(terminal(rows))
    for name, causes in failures.items():
        for cause, count in causes.most_common():
            print(f"{name}: {count} chains failed, {cause}")
    print(f"written: {folder / RESULTS}, {folder / 'results.md'}")
    return rows


def _predict_all(config: Config, data: dict[str, Path], folder: Path, sampled: bool) -> dict[str, Counter[str]]:
    """Masks of every benchmark's expressions; returns how many chains failed of which cause, by benchmark."""
    settings, failures = _settings(config, sampled, data), {}
    _check_settings(folder, settings)  # what needs no tracker is refused before one is started
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK, f"another process evaluates into {folder}: wait for it or choose another --out")
    with lock, tracker_client(config) as client:
        settings = _check_settings(folder, settings | {"tracker": client.info().model})
        loaded = load_engine(config)
        engine = loaded.engine if sampled else loaded.greedy
        params = engine.weights((loaded.trained, loaded.frozen))
        del loaded
        write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        for name, path in data.items():
            failures[name] = predict(BENCHMARKS[name], path, folder / name, engine, params, client, config.run.seed)
    return failures


def _settings(config: Config, sampled: bool, data: dict[str, Path]) -> dict[str, Any]:
    """All that decides a prediction, but for the tracker. Policy and data by their content: folders may be moved, or
    written anew."""
    policy = config.policy
    settings = {
        "policy": [policy_digest(policy.path), policy.dtype, policy.param_dtype],
        "chain": dataclasses.asdict(config.chain),
        "sampling": dataclasses.asdict(config.rollout) | {"seed": config.run.seed} if sampled else "greedy",
        "data": {name: read_prepared(path)["fingerprint"] for name, path in data.items()},
    }
    return json.loads(json.dumps(settings))


def _check_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those of the folder, which must agree: predictions of two policies must not be mixed."""
    path = folder / SETTINGS
    if path.exists():
        old = json.loads(path.read_text())
        changed = [key for key in settings if key != "data" and old.get(key) != settings[key]]
        changed += [name for name, content in settings["data"].items() if old["data"].get(name, content) != content]
        if changed:
            raise InputError(f"{folder} holds predictions of another {', '.join(changed)}: choose another --out")
        return settings | {"data": old["data"] | settings["data"]}
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise InputError(f"{folder} is not empty and holds no evaluation: choose another --out")
    return settings


def _write_results(folder: Path, rows: Sequence[Row], failures: dict[str, Counter[str]]) -> None:
    content = {"rows": [dataclasses.asdict(row) for row in rows], "failures": failures}
    write_whole(folder / RESULTS, json.dumps(content, indent=2) + "\n")
    write_whole(folder / "results.md", markdown(rows))
