"""Writes reports: single HTML files that need nothing else, neither the network nor JavaScript."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.report import chains, comparison, results
from revseg_jax.report.plots import curves
from revseg_jax.report.run_files import RunFiles, read_run

NAME, COMPARISON = "report.html", "comparison.html"


def main(runs: Sequence[str]) -> None:
    """`revseg report RUN [RUN ...]`: writes the report of a run, or a comparison of several, and prints its path."""
    folders = [Path(run) for run in runs]
    print(write_report(folders[0]) if len(folders) == 1 else write_comparison(folders))


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from what the run has left so far and returns its path.

    Raises InputError when the folder is missing or a file in it is damaged, RunFailure when it cannot be written. An
    older report stays until the new one is complete.
    """
    run_dir = Path(run_dir)
    return _write(run_dir / NAME, render(read_run(run_dir)))


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Writes comparison.html beside the first run's folder and returns its path. Raises as `write_report` does."""
    names = comparison.names_of(run_dirs)
    runs = {name: read_run(folder) for name, folder in zip(names, run_dirs, strict=True)}
    page = (
        _environment()
        .get_template("comparison.html")
        .render(
            rows=comparison.rows(runs), settings=comparison.settings(runs), names=names, curves=comparison.curves(runs)
        )
    )
    return _write(run_dirs[0].resolve().parent / COMPARISON, page)


def _write(path: Path, page: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(page.encode("utf-8", "replace"))  # a text may hold half a surrogate pair
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailure(f"cannot write {path}: {error.strerror or error}") from None
    return path


def render(run: RunFiles) -> str:
    """The whole page. Everything that comes from the run is escaped by the template."""
    base, trained = results.before_and_after(run)
    pairs = chains.pairs_of(run)
    rewards, training = curves(run.metrics, run.evaluations)
    try:
        clips = [chains.shown(why, pair) for why, pair in chains.chosen(pairs)]
        groups = [chains.group_of(records) for records in (run.first_step, run.last_step) if records]
        changes = chains.changes(run.evaluated)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"traces of run {run.name}: {error}; remove or repair them") from None
    return (
        _environment()
        .get_template("report.html")
        .render(
            run=run,
            headline=results.headline(run),
            facts=results.facts(run),
            scores=results.score_rows(base, trained),
            kinds=results.kind_bars(base, trained),
            temporal=results.temporal_bars(base, trained),
            verdict=results.temporal_verdict(base, trained),
            reward_curves=rewards,
            training_curves=training,
            clips=clips,
            overview=chains.overview(pairs),
            groups=groups,
            changes=changes,
            manifest=json.dumps({k: v for k, v in run.manifest.items() if k != "config"}, indent=2, ensure_ascii=False),
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
