"""Several runs beside each other: their results, what was set differently, their curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError
from revseg_jax.report.plots import Curve, compared
from revseg_jax.report.results import before_and_after, facts, number
from revseg_jax.report.run_files import RunFiles


@dataclass(frozen=True)
class Row:
    """One run's result. J&F of the base, after training, and of the best evaluation, as printed; facts by name."""

    name: str
    base: str
    trained: str
    best: str
    facts: dict[str, str]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many of those above as tell them apart. Raises InputError for a run given twice."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise InputError("a run is given twice: compare different ones")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]


def rows(runs: Mapping[str, RunFiles]) -> list[Row]:
    result = []
    for name, run in runs.items():
        scores = [number(record.get("jf")) for record in (*before_and_after(run), *run.evaluations)]
        best = max((score for score in scores[2:] if score is not None), default=None)
        texts = ["–" if score is None else f"{score:.1f}" for score in (*scores[:2], best)]
        result.append(Row(name, *texts, dict(facts(run))))
    return result


def settings(runs: Mapping[str, RunFiles]) -> list[tuple[str, list[str]]]:
    """(name of a field, its value in each run) of all fields that are not the same in all runs, but for the folder."""
    columns = [dict(_flat(run.manifest.get("config"), "")) for run in runs.values()]
    keys = dict.fromkeys(key for column in columns for key in column)
    table = [(key, [column.get(key, "–") for column in columns]) for key in keys if key != "run.dir"]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def curves(runs: Mapping[str, RunFiles]) -> list[Curve]:
    return compared({name: (run.metrics, run.evaluations) for name, run in runs.items()})
