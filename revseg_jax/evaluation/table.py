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
    return as_markdown([HEADER, *map(cells, rows)]) + "\n"


def terminal(rows: Sequence[Row]) -> str:
    return as_text([HEADER, *map(cells, rows)])


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its header."""
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *rows))


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
