"""`revseg reproduce`: one of the paper's ablations on synthetic clips. Read it from top to bottom."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from revseg_jax.config import Config, check_training, load_config
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.demo import DIFFICULTY
from revseg_jax.errors import InputError
from revseg_jax.evaluation.held_out import evaluate_policy
from revseg_jax.paths import local_only, write_whole
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.reproduction.results import Scores, markdown, summary, terminal
from revseg_jax.reproduction.tables import TABLES, Cell, Table
from revseg_jax.rollout.loading import load_engine
from revseg_jax.run.digests import parameter_digest
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.train import tracker_client, train

SETTINGS = "settings.json"
BUDGET = ("run.checkpoint_every=20", "run.keep_checkpoints=1", "run.traces_every=0")
KEPT = ("jf", "j", "f", "temporal", "spatial", "format", "best_constant_keyframe", "random_visible_keyframe")


def main(
    name: str,
    seeds: Sequence[int],
    out: str,
    clips: tuple[int, int],
    configs: Sequence[str],
    overrides: Sequence[str] = (),
) -> None:
    """Fills the table TABLES[name] and prints it.

    clips: train and test clips of each seed. configs, overrides: what all runs share, as `load_config` takes it; the
    table's own settings lie under the overrides, those of its cells over them. Writes into <out>/<name>: the clips, a
    run's folder for every trained cell, each cell's scores, results.json and results.md. A second call keeps what is
    finished and goes on with an interrupted run from its checkpoint; with other settings it is an InputError.
    """
    table, folder = TABLES[name], local_only(out) / name

    def configured(*more: str) -> Config:
        return load_config(configs, [*BUDGET, *table.overrides, *overrides, *more])

    base = configured(f"run.dir={folder}")
    check_training(base)
    scores: Scores = {cell.name: {} for cell in table.cells}
    settings = settings_of(base, clips)
    check_settings(folder, settings)  # what needs no tracker is refused before one is started
    with tracker_client(base) as client:
        settings["tracker"] = client.info().model
        check_settings(folder, settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        for seed in seeds:
            data = folder / "clips" / f"seed_{seed}"  # of its own: tables may be filled at the same time
            prepare_synthetic(data, DIFFICULTY, *clips, seed=seed)
            for cell in table.cells:
                place = folder / f"seed_{seed}"
                where = [f"run.dir={place / (cell.run or 'base')}", f"run.seed={seed}"]
                where += [f"data.train=[{data}]", f"data.test=[{data}]"]
                run = configured(*cell.overrides, *where)
                evaluated = configured(*cell.overrides, *cell.shown, "rewards.temporal_kind=soft", *where)
                record = place / f"{''.join(c if c.isalnum() else '_' for c in cell.name)}.json"
                if not record.exists():
                    found = score_cell(cell, run, evaluated, client)
                    place.mkdir(parents=True, exist_ok=True)
                    write_whole(record, json.dumps(found, indent=2) + "\n")
                scores[cell.name][seed] = json.loads(record.read_text())
    write_results(table, folder, scores)


def score_cell(cell: Cell, run: Config, evaluated: Config, client: TrackerClient) -> dict[str, float]:
    """Trains where the cell says so, and evaluates on the test clips."""
    loaded = load_engine(run)
    trained = loaded.trained
    if cell.run:
        trained = train(run, loaded, client).trained
    encoder = dataclasses.replace(loaded.engine.encoder, chain=evaluated.chain)
    engine = dataclasses.replace(loaded.greedy, encoder=encoder)
    source = ClipSource(evaluated.data.test, evaluated.data.test_split)
    evaluation, _ = evaluate_policy(engine, (trained, loaded.frozen), source, evaluated, client, cell.name)
    return {name: getattr(evaluation, name) for name in KEPT}


def settings_of(config: Config, clips: tuple[int, int]) -> dict[str, Any]:
    """All that decides a table's numbers, but for the tracker's model."""
    parts: dict[str, Any] = dataclasses.asdict(config)
    parts["run"] = {"steps": config.run.steps}
    del parts["tracker"]
    policy = parameter_digest(nnx.state(load_policy(config.policy.path).policy))
    return json.loads(json.dumps(parts | {"parameters": policy, "clips": clips}))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Numbers of different policies, trackers or settings must not meet in one table: InputError."""
    path = folder / SETTINGS
    old = json.loads(path.read_text()) if path.exists() else settings
    changed = [key for key in settings if settings[key] != old.get(key)]
    if changed:
        raise InputError(f"{folder} holds results with another {', '.join(changed)}: choose another --out")


def write_results(table: Table, folder: Path, scores: Scores) -> None:
    results = summary(table, scores)
    write_whole(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "results.md", markdown(results))
    print(terminal(results))
    print(f"written: {folder / 'results.json'}, {folder / 'results.md'}")
