"""Writes a run's report: one HTML file that needs nothing else, neither the network nor JavaScript."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.report import chains, results
from revseg_jax.report.plots import curves
from revseg_jax.report.run_files import RunFiles, read_run

NAME = "report.html"


def main(run: str) -> None:
    """`revseg report RUN`: writes the report and prints its path."""
    print(write_report(Path(run)))


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from what the run has left so far and returns its path.

    Raises InputError when the folder is missing or a file in it is damaged, RunFailure when it cannot be written. An
    older report stays until the new one is complete.
    """
    run_dir = Path(run_dir)
    path, partial = run_dir / NAME, run_dir / f".{NAME}.{os.getpid()}.partial"
    page = render(read_run(run_dir)).encode("utf-8", "replace")  # a text may hold half a surrogate pair
    try:
        try:
            partial.write_bytes(page)
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        clips = [chains.shown(why, pair) for why, pair in chains.chosen(pairs)]
        groups = [chains.group_of(records) for records in (run.first_step, run.last_step) if records]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"traces of run {run.name}: {error}; remove or repair them") from None
    return environment.get_template("report.html").render(
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
        manifest=json.dumps({k: v for k, v in run.manifest.items() if k != "config"}, indent=2, ensure_ascii=False),
    )
