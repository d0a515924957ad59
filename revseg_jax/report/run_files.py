"""Reads what a run left in its folder. Only the folder itself must be there; every file in it is optional."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError

Record = dict[str, Any]

KNOWN = ("config.yaml", "run.json", "metrics.jsonl", "evaluation.jsonl", "summary.json", "traces")


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say; empty where a file is missing.

    Attributes:
      name: of the folder
      config: text of config.yaml
      manifest: run.json
      metrics: one record a training step, steps ascending; of a step taken twice (a resumed run) the later record
      evaluations: one record an evaluation on held-out clips, in the order they were made
      summary: summary.json of the demo
      base, trained: traces of the held-out chains before and after training, or after its last evaluation
      evaluated: (step, traces of the held-out chains) of every evaluation during training, steps ascending
      first_step, last_step: traces of the first and of the last training step that has any
    """

    name: str
    config: str
    manifest: Record
    metrics: list[Record]
    evaluations: list[Record]
    summary: Record
    base: list[Record]
    trained: list[Record]
    evaluated: list[tuple[int, list[Record]]]
    first_step: list[Record]
    last_step: list[Record]


def read_run(run_dir: Path) -> RunFiles:
    """Raises InputError when the folder is missing, holds no run, or holds a file that cannot be read."""
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist")
    if not any((run_dir / name).exists() for name in KNOWN):
        raise InputError(f"{run_dir} is not a run folder: it holds none of {', '.join(KNOWN)}")
    traces = run_dir / "traces"
    steps = sorted(traces.glob("step_*.jsonl"))
    evaluated = [(int(path.stem[5:]), _lines(path)) for path in sorted(traces.glob("eval_[0-9]*.jsonl"))]
    by_step = {record.get("step"): record for record in _lines(run_dir / "metrics.jsonl")}
    return RunFiles(
        name=run_dir.resolve().name,
        config=_text(run_dir / "config.yaml"),
        manifest=_object(run_dir / "run.json"),
        metrics=[by_step[step] for step in sorted(step for step in by_step if isinstance(step, int))],
        evaluations=_lines(run_dir / "evaluation.jsonl"),
        summary=_object(run_dir / "summary.json"),
        base=_lines(traces / "eval_base.jsonl") or next((chains for step, chains in evaluated if step == 0), []),
        trained=_lines(traces / "eval_trained.jsonl") or next((c for step, c in reversed(evaluated) if step > 0), []),
        evaluated=evaluated,
        first_step=_lines(steps[0]) if len(steps) > 1 else [],
        last_step=_lines(steps[-1]) if steps else [],
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _object(path: Path) -> Record:
    text = _text(path)
    return _parse(path, text, 1) if text else {}


def _lines(path: Path) -> list[Record]:
    """Records of a JSON-lines file. A last line without its end may be one that a stopped run was still writing."""
    *lines, last = _text(path).split("\n")
    records = [_parse(path, line, number) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return records + ([_parse(path, last, len(lines) + 1)] if last.strip() else [])
    except InputError:
        return records


def _parse(path: Path, text: str, line: int) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{path}, line {line}: not a JSON object; remove the line or the file")
    return record
