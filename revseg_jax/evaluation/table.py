"""The results as one table, in the papers' order, beside the published numbers."""

from __future__ import annotations

from collections.abc import Sequence

from revseg_jax.evaluation.benchmarks import PUBLISHED
from revseg_jax.evaluation.protocols import Row

HEADER = ("benchmark", "J", "F", "J&F", "ReVSeg J / F / J&F", "expressions", "missing", "protocol")


def cells(row: Row) -> tuple[str, ...]:
    numbers = tuple("" if value is None else f"{value:.1f}" for value in (row.j, row.f, row.jf))
    published = " / ".join(f"{value:.1f}" for value in PUBLISHED.get(row.title, ()))
    others = "".join(f"; {name} {value:.1f}" for name, value in row.others.items())
    return (row.title, *numbers, published, str(row.expressions), str(row.missing), row.protocol + others)


def markdown(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (HEADER, ("---",) * len(HEADER), *map(cells, rows))]
    return "\n".join(lines) + "\n"


def terminal(rows: Sequence[Row]) -> str:
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
