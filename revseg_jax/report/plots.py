"""Curves over training steps as inline SVG whose colours come from the page's style sheet (light and dark)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from revseg_jax.report.results import number
from revseg_jax.report.run_files import Record

# Colours that stand for CSS variables; they are replaced in the finished SVG.
TEXT, GRID = "#010200", "#010201"
SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214")
VARIABLES = {TEXT: "var(--muted)", GRID: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's own font
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}
POINTS = 400
OUTLIER = 6.0  # a phase that takes this many times its median is compilation, not work


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[tuple[str, str], ...]  # (key of a metric, its name)
    limits: tuple[float, float] | None = None  # of the y axis
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One finished panel. `legend` has (name, index of the colour) when there are several series."""

    title: str
    svg: str
    summary: str
    legend: list[tuple[str, int]]
    note: str


PAPER = (  # the six panels of the training curves in arXiv 2512.02835, in their order
    Panel("Format reward", (("reward/format", ""),), (0, 1)),
    Panel("Temporal reward", (("reward/temporal", ""),), (0, 1)),
    Panel("Spatial reward", (("reward/spatial", ""),), (0, 1)),
    Panel("Response length", (("rollout/tokens", ""),), note="tokens of both turns"),
    Panel("Total reward", (("reward/total", ""),)),
    Panel("Turns", (("rollout/turns", ""),), (1, 2)),
)
MASK = Panel("Mask reward", (("reward/mask", ""),), (0, 1))
HELD_OUT = Panel("Held-out J&F", (("jf", ""),), (0, 100), "greedy answers")
TRAINING = (
    Panel("Entropy, nats per token", (("learner/entropy", ""),)),
    Panel("KL to the reference", (("learner/kl", ""),)),
    Panel("Gradient norm", (("learner/gradient_norm", ""),)),
    Panel("Loss", (("learner/loss", ""),)),
    Panel("Clip fraction", (("learner/clip_fraction", ""),)),
    Panel(
        "Shares",
        (
            ("failures/any", "failed chains"),
            ("rollout/truncated", "answers cut off"),
            ("reward/groups_without_spread", "groups without spread"),
            ("rollout/wasted_decode_steps", "wasted decoding"),
            ("rollout/padding", "padding"),
        ),
        (0, 1),
    ),
    Panel("Log-prob gap", (("rollout/logprob_gap", ""),), note="between sampler and learner"),
    Panel(
        "Seconds per phase",
        (
            ("seconds/rollout", "rollout"),
            ("seconds/reward_wait", "reward wait"),
            ("seconds/update", "update"),
            ("seconds/reference", "reference"),
            ("seconds/data", "data"),
        ),
    ),
    Panel("Tokens per second", (("speed/tokens_per_second", ""),), note="sampled ones, over the whole step"),
    Panel("Peak memory, GiB", (("memory/host_gib", "host"), ("memory/device_gib", "fullest device"))),
)
COMPARED = (*PAPER, MASK, *TRAINING[:3])


def curves(metrics: list[Record], evaluations: list[Record]) -> tuple[list[Curve], list[Curve]]:
    """(the paper's panels, mask reward and held-out J&F; everything else); panels without any number are left out."""

    def curve(panel: Panel, records: list[Record], every_point: bool = False) -> Curve | None:
        return _curve(panel, [(name, records, key) for key, name in panel.series], every_point)

    rewards = [curve(panel, metrics) for panel in (*PAPER, MASK)] + [curve(HELD_OUT, evaluations, every_point=True)]
    training = [curve(panel, metrics) for panel in TRAINING]
    return [curve for curve in rewards if curve], [curve for curve in training if curve]


def compared(runs: Mapping[str, tuple[list[Record], list[Record]]]) -> list[Curve]:
    """Panels with a line for each run; runs: (metrics, evaluations) by the run's name."""

    def curve(panel: Panel, which: int, every_point: bool = False) -> Curve | None:
        return _curve(panel, [(name, files[which], panel.series[0][0]) for name, files in runs.items()], every_point)

    panels = [curve(panel, 0) for panel in COMPARED] + [curve(HELD_OUT, 1, every_point=True)]
    return [curve for curve in panels if curve]


def smooth(values: np.ndarray) -> np.ndarray:
    """float [N] -> float [N]: Gaussian mean over neighbouring points, its deviation 2.5 % of the curve's length."""
    place = np.arange(len(values))
    deviation = max(1.0, 0.025 * len(values))
    weights = np.exp(-0.5 * ((place[:, None] - place) / deviation) ** 2)
    return weights @ values / weights.sum(1)


def _curve(panel: Panel, lines: Sequence[tuple[str, list[Record], str]], every_point: bool) -> Curve | None:
    """lines: (name, records, key of the metric) each. every_point: few exact numbers, joined and marked; else many
    noisy ones, smoothed, the raw ones faint behind."""
    note, slow, legend, summary = panel.note, [], [], []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(3.6, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, records, key) in enumerate(lines):
            colour = SERIES[index % len(SERIES)]
            steps, values = _points(records, key)
            if len(values) and key.startswith("seconds/"):
                usual = values <= OUTLIER * max(np.median(values), 0.01)
                slow += values[~usual].tolist()
                steps, values = steps[usual], values[usual]
            if not len(values):
                continue
            if not every_point:
                steps, values = _thin(steps), _thin(values)
            line = values if every_point else smooth(values)
            if not every_point:
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            marker = {"marker": "o", "markersize": 4} if every_point or len(values) == 1 else {}
            axes.plot(steps, line, color=colour, linewidth=1.6, **marker)
            legend.append((name, index % len(SERIES)))
            summary.append(f"{name} {_short(line[0])} → {_short(line[-1])}".strip())
        if not legend:
            return None
        if slow:
            note = f"{len(slow)} slow ones not drawn (compilation), the slowest {max(slow):.0f} s"
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        if panel.limits:
            low, high = panel.limits
            axes.set_yticks(np.linspace(low, high, 3))
            axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        svg = _svg(figure)
    return Curve(panel.title, svg, ", ".join(summary), legend if len(lines) > 1 else [], note)


def _points(records: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite number under the key."""
    pairs = [(number(record.get("step")), number(record.get(key))) for record in records]
    pairs = [pair for pair in pairs if None not in pair]
    return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)


def _thin(values: np.ndarray) -> np.ndarray:
    """Means of neighbours, at most POINTS of them: more cannot be seen."""
    return np.array([part.mean() for part in np.array_split(values, min(len(values), POINTS))])


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element for HTML: scales with its box, no addresses, colours from the style sheet."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    opening, rest = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening).group()
    # Rules in a <style> would hold for the whole page, and names of groups would be there once a figure.
    rest = re.sub(r"<(metadata|style).*?</\1>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r"font-family: [^;]*;", "", rest)
    rest = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", _hundredths, tag.group()), rest)
    rest = re.sub(r"\s*\n\s*", " ", rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, variable)
    return f'<svg {box} aria-hidden="true">{rest}'


def _hundredths(match: re.Match) -> str:
    return f"{float(match.group()):.2f}"


def _short(value: float) -> str:
    digits = 2 if abs(value) < 1 else 3
    text = f"{abs(value):.{digits}g}" if abs(value) < 1000 else f"{abs(value):.0f}"
    return ("−" if value < 0 else "") + text.replace("e-0", "e-")
