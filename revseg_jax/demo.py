"""`revseg demo`: clips, base evaluation, GRPO, evaluation, report; small, real, and without a download."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from revseg_jax.config import Config, check_training
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import REVERSED, prepare_synthetic
from revseg_jax.errors import InputError
from revseg_jax.evaluation.held_out import Evaluation, evaluate_policy
from revseg_jax.report.html import write_report
from revseg_jax.rollout.loading import LoadedEngine, load_engine
from revseg_jax.run.folder import check_same_settings
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.train import tracker_client, train

DIFFICULTY = "easy"
TRAIN_CLIPS, TEST_CLIPS = 400, 96
ILLUSTRATED = 24  # chains of each evaluation that carry pictures into the report
TERMS = ("j", "f", "format", "temporal", "spatial", "mask", "turns")


def main(config: Config) -> None:
    """Runs everything into `run.dir`, which must be new or hold a demo that was stopped, and prints the table and the
    summary."""
    check_training(config)  # before the base policy is evaluated for minutes
    begin = time.perf_counter()
    folder = Path(config.run.dir)
    clips = folder / "clips"
    data = dataclasses.replace(config.data, train=[str(clips)], test=[str(clips)])
    config = dataclasses.replace(config, data=data)
    goes_on = was_stopped(folder, config)
    prepare_synthetic(clips, DIFFICULTY, TRAIN_CLIPS, TEST_CLIPS, seed=config.run.seed)

    loaded = load_engine(config)
    with tracker_client(config) as client:
        base, base_reversed = evaluate(loaded, loaded.trained, config, client, "base")
        state = train(config, loaded, client)
        trained, trained_reversed = evaluate(loaded, state.trained, config, client, "trained")

    summary = {
        "base_jf": base.jf,
        "trained_jf": trained.jf,
        "base": {name: getattr(base, name) for name in TERMS},
        "trained": {name: getattr(trained, name) for name in TERMS},
        "best_constant_keyframe": trained.best_constant_keyframe,
        "random_visible_keyframe": trained.random_visible_keyframe,
        "base_reversed_temporal": base_reversed.temporal,
        "trained_reversed_temporal": trained_reversed.temporal,
        "steps": config.run.steps,
        "seconds": round(time.perf_counter() - begin, 1),
        "seed": config.run.seed,
    }
    if goes_on:
        summary["seconds_since"] = "the last start"
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(folder)
    print(table(base, trained, base_reversed, trained_reversed))
    print(f"report: {report}")
    print(json.dumps(summary))


def was_stopped(folder: Path, config: Config) -> bool:
    """Whether `folder` holds a demo with this config whose training had begun. Raises InputError when it holds a
    finished one or another run."""
    finished, begun = ((folder / name).exists() for name in ("summary.json", "checkpoints"))
    if finished or begun and not (folder / "config.yaml").exists():
        raise InputError(f"{folder} already holds a run: delete it or give another run.dir=...")
    if begun:
        check_same_settings(folder, config)
    return begun


def evaluate(
    loaded: LoadedEngine, params, config: Config, client: TrackerClient, label: str
) -> tuple[Evaluation, Evaluation]:
    """(on the held-out clips, on the same clips played backwards without tracking); both are recorded in the run."""
    folder = Path(config.run.dir)
    sides = {}
    for split, tracker in (("test", client), (REVERSED, None)):
        source = ClipSource(config.data.test, split)
        name = label if split == "test" else f"{label} (reversed clips)"
        pictures = ILLUSTRATED if split == "test" else 0
        sides[split], traces = evaluate_policy(
            loaded.greedy, (params, loaded.frozen), source, config, tracker, name, pictures
        )
        if split == "test":
            (folder / "traces").mkdir(exist_ok=True)
            lines = "".join(json.dumps(trace) + "\n" for trace in traces)
            (folder / "traces" / f"eval_{label}.jsonl").write_text(lines)
    record = {"step": 0 if label == "base" else config.run.steps, "label": label}
    record |= dataclasses.asdict(sides["test"]) | {"reversed_temporal": sides[REVERSED].temporal}
    with open(folder / "evaluation.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    return sides["test"], sides[REVERSED]


def table(base: Evaluation, trained: Evaluation, base_reversed: Evaluation, trained_reversed: Evaluation) -> str:
    rows = [("J&F", base.jf, trained.jf), ("J", base.j, trained.j), ("F", base.f, trained.f)]
    rows += [(f"  J&F, {kind} queries", base.by_kind[kind], trained.by_kind[kind]) for kind in base.by_kind]
    rows += [(name, getattr(base, name), getattr(trained, name)) for name in ("format", "turns", "spatial", "mask")]
    rows += [
        ("temporal", base.temporal, trained.temporal),
        ("  best constant keyframe", base.best_constant_keyframe, trained.best_constant_keyframe),
        ("  random visible keyframe", base.random_visible_keyframe, trained.random_visible_keyframe),
        ("  on reversed clips", base_reversed.temporal, trained_reversed.temporal),
    ]
    lines = [f"{'held-out clips':<28}{'base':>9}{'trained':>9}"]
    return "\n".join(lines + [f"{name:<28}{before:>9.2f}{after:>9.2f}" for name, before, after in rows])
