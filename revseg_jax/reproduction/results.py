"""A table's results: means and spreads over seeds, the paper's numbers beside them, and which of its orders held."""

from __future__ import annotations

from typing import Any

import numpy as np

from revseg_jax.evaluation.table import as_markdown, as_text
from revseg_jax.reproduction.tables import METRICS, Order, Table

Scores = dict[str, dict[int, dict[str, float]]]  # cell -> seed -> field of an Evaluation


def held(order: Order, values: dict[str, float]) -> bool:
    """Whether the cells' values stand in that order, without ties."""
    pairs = zip(order.ranks, order.ranks[1:], strict=False)
    return all(min(values[cell] for cell in high) > max(values[cell] for cell in low) for high, low in pairs)


def summary(table: Table, scores: Scores) -> dict[str, Any]:
    """What is written as JSON. Spreads are standard deviations of the seeds (n - 1), 0 for a single one."""
    seeds = list(next(iter(scores.values())))
    cells = {}
    for cell in table.cells:
        of_seeds = list(scores[cell.name].values())
        columns = {name: [values[name] for values in of_seeds] for name in of_seeds[0]}
        cells[cell.name] = {
            "mean": {name: float(np.mean(column)) for name, column in columns.items()},
            "spread": {
                name: float(np.std(column, ddof=1)) if len(column) > 1 else 0.0 for name, column in columns.items()
            },
            "seeds": {str(seed): scores[cell.name][seed] for seed in seeds},
            "paper": dict(zip(table.benchmarks, cell.paper, strict=True)),
        }
    orders = [
        {
            "order": str(order),
            "held": held(order, {name: cell["mean"][order.metric] for name, cell in cells.items()}),
            "seeds_held": sum(
                held(order, {name: of_seeds[seed][order.metric] for name, of_seeds in scores.items()}) for seed in seeds
            ),
        }
        for order in table.orders
    ]
    return {"title": table.title, "seeds": seeds, "cells": cells, "orders": orders, "note": table.note}


def terminal(results: dict[str, Any]) -> str:
    return "\n".join([results["title"], as_text(_lines(results)), *_remarks(results)])


def markdown(results: dict[str, Any]) -> str:
    return "\n\n".join([f"# {results['title']}", as_markdown(_lines(results)), *_remarks(results)]) + "\n"


def _lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows. What choosing keyframes blindly would earn stands in brackets: the best constant one, a random
    visible one."""
    benchmarks = next(iter(results["cells"].values()))["paper"]
    header = ("", *METRICS.values(), *(f"paper, {name}" for name in benchmarks))
    lines = [header]
    for name, cell in results["cells"].items():
        mean, spread = cell["mean"], cell["spread"]
        blind = f" [{mean['best_constant_keyframe']:.2f}, {mean['random_visible_keyframe']:.2f}]"
        numbers = (
            f"{mean['jf']:.1f} ± {spread['jf']:.1f}",
            f"{mean['temporal']:.2f} ± {spread['temporal']:.2f}{blind}",
            f"{mean['spatial']:.2f} ± {spread['spatial']:.2f}",
        )
        lines.append((name, *numbers, *(f"{value:.1f}" for value in cell["paper"].values())))
    return lines


def _remarks(results: dict[str, Any]) -> list[str]:
    count = len(results["seeds"])
    orders = [
        f"{'held' if order['held'] else 'DID NOT HOLD'} on average, in {order['seeds_held']} of {count} seeds: "
        f"{order['order']}"
        for order in results["orders"]
    ]
    return [*orders, results["note"]]
