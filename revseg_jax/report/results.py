"""What came out of a run, in words and in rows of tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from revseg_jax.report.run_files import Record, RunFiles

# (field of an evaluation, name, what it is, decimals). J, F and J&F are 0-100, the others mean rewards.
SCORES = (
    ("j", "J", "overlap of the masks, %", 1),
    ("f", "F", "accuracy of their contours, %", 1),
    ("jf", "J&F", "mean of the two", 1),
    ("format", "Format", "answers follow the rules", 2),
    ("temporal", "Temporal", "the keyframe shows the object large", 2),
    ("spatial", "Spatial", "the box fits on the keyframe", 2),
    ("mask", "Mask", "overlap of the masks on the frames shown", 2),
    ("turns", "Turns", "out of 2", 2),
)


@dataclass(frozen=True)
class Row:
    name: str
    note: str
    base: str
    trained: str
    change: str
    trend: str  # better | worse | same, from the numbers as they are printed


@dataclass(frozen=True)
class Bar:
    name: str
    value: str
    percent: float  # length of the bar, 0-100
    series: str  # base | trained | blind (chosen without looking)


def number(value: Any) -> float | None:
    """The value as a float when it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def before_and_after(run: RunFiles) -> tuple[Record, Record]:
    """The first evaluation of the base and the last of the trained policy; from the summary when there is none.

    Evaluations that training makes on its schedule have no label: that of step 0 is the base's.
    """

    def label(record: Record) -> str:
        return record.get("label") or ("trained" if record.get("step") else "base")

    base = next((record for record in run.evaluations if label(record) == "base"), None)
    trained = next((record for record in reversed(run.evaluations) if label(record) == "trained"), None)
    return tuple(found or _from_summary(run.summary, label) for label, found in (("base", base), ("trained", trained)))


def _from_summary(summary: Record, label: str) -> Record:
    scores = summary.get(label)
    scores = dict(scores) if isinstance(scores, dict) else {}
    jf = number(summary.get(f"{label}_jf"))
    return scores | ({"jf": jf} if jf is not None else {})


def headline(run: RunFiles) -> str:
    """The result in one sentence."""
    records = before_and_after(run)
    base, trained = (number(record.get("jf")) for record in records)
    clips = number((records[1] or records[0]).get("clips"))
    where = f" on {clips:.0f} clips" if clips else ""
    steps = f"{run.metrics[-1]['step']} steps" if run.metrics else "the steps so far"
    if base is None and trained is None:
        return f"No evaluation on held-out clips yet after {steps}." if run.metrics else "Nothing was measured yet."
    if base is None or trained is None:
        name, value = ("base", base) if trained is None else ("trained", trained)
        return f"The {name} policy reaches a held-out J&F of {value:.1f}{where}; the other one was not evaluated."
    change = round(trained, 1) - round(base, 1)
    if abs(change) < 0.05:
        return f"Reinforcement learning left held-out J&F at {trained:.1f}{where}, over {steps}."
    verb = "raised" if change > 0 else "lowered"
    return f"Reinforcement learning {verb} held-out J&F from {base:.1f} to {trained:.1f} ({_signed(change, 1)}){where}."


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """A few (name, value) pairs about the run, those that are known."""
    metrics, summary, manifest = run.metrics, run.summary, run.manifest
    times = [time for record in metrics if (time := number(record.get("time")))]
    seconds = number(summary.get("seconds")) or (times[-1] - times[0] if len(times) > 1 else None)
    git = manifest.get("git") if isinstance(manifest.get("git"), dict) else {}
    revision = str(git.get("revision") or "")[:10] + ("" if git.get("clean", True) else " + changes")
    known = {
        "steps": metrics[-1]["step"] if metrics else summary.get("steps"),
        "time": _duration(seconds) if seconds else None,
        "seed": summary.get("seed", manifest.get("seed")),
        "ended": datetime.fromtimestamp(times[-1], UTC).strftime("%Y-%m-%d %H:%M UTC") if times else None,
        "revision": revision,
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def score_rows(base: Record, trained: Record) -> list[Row]:
    return [
        _row(name, note, number(base.get(key)), number(trained.get(key)), digits)
        for key, name, note, digits in SCORES
        if number(base.get(key)) is not None or number(trained.get(key)) is not None
    ]


def _row(name: str, note: str, base: float | None, trained: float | None, digits: int) -> Row:
    texts = ["–" if value is None else f"{value:.{digits}f}" for value in (base, trained)]
    if base is None or trained is None:
        return Row(name, note, *texts, "", "same")
    change = round(trained, digits) - round(base, digits)
    if abs(change) < 0.5 * 10**-digits:
        return Row(name, note, *texts, "±0", "same")
    return Row(name, note, *texts, _signed(change, digits), "better" if change > 0 else "worse")


def kind_bars(base: Record, trained: Record) -> list[tuple[str, list[Bar]]]:
    """J&F of each kind of query: (kind, bars of base and trained)."""
    tables = [(label, table) for label, record in (("base", base), ("trained", trained))
              if isinstance(table := record.get("by_kind"), dict)]  # fmt: skip
    kinds = dict.fromkeys(kind for _, table in tables for kind in table)
    bars = {
        kind: [_bar(label.capitalize(), value, 100, 1, label)
               for label, table in tables if (value := number(table.get(kind))) is not None]
        for kind in kinds
    }  # fmt: skip
    return [(kind, row) for kind, row in bars.items() if row]


def temporal_bars(base: Record, trained: Record) -> list[Bar]:
    """The temporal reward beside what clips played backwards and keyframes chosen blindly give."""
    either = trained or base
    entries = (
        ("Base", base.get("temporal"), "base"),
        ("Trained", trained.get("temporal"), "trained"),
        ("Base, clips reversed", base.get("reversed_temporal"), "base"),
        ("Trained, clips reversed", trained.get("reversed_temporal"), "trained"),
        ("Best constant keyframe", either.get("best_constant_keyframe"), "blind"),
        ("Random visible keyframe", either.get("random_visible_keyframe"), "blind"),
    )
    return [_bar(name, value, 1, 2, series) for name, raw, series in entries if (value := number(raw)) is not None]


def temporal_verdict(base: Record, trained: Record) -> str:
    """Whether the keyframes are better than blind ones, in one or two sentences; "" when that is not known."""
    record, who = (trained, "trained") if trained else (base, "base")
    names = (
        ("best_constant_keyframe", "the best constant keyframe"),
        ("random_visible_keyframe", "a random visible one"),
    )
    score, backwards = _printed(record.get("temporal")), _printed(record.get("reversed_temporal"))
    blind = [(value, name) for key, name in names if (value := _printed(record.get(key))) is not None]
    if score is None or not blind:
        return ""
    beaten = [name for value, name in blind if score > value]
    missed = [name for value, name in blind if score <= value]
    parts = [f"better than {' and '.join(beaten)}"] if beaten else []
    parts += [f"no better than {' and '.join(missed)}"] if missed else []
    text = f"The {who} policy's keyframes are {', but '.join(parts)}."
    if backwards is not None:
        best, name = max(blind)
        where = "past" if backwards > best else "not past"
        text += f" On the same clips played backwards they score {backwards:.2f}, {where} {name}."
    return text


def _printed(value: Any) -> float | None:
    """A reward as the page prints it: what looks equal there is equal."""
    value = number(value)
    return None if value is None else round(value, 2)


def _bar(name: str, value: float, full: float, digits: int, series: str) -> Bar:
    return Bar(name, f"{value:.{digits}f}", round(min(max(value / full, 0.0), 1.0) * 100, 1), series)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
