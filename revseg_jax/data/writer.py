"""Writes prepared folders, for every dataset alike: in parts, in parallel, and where it was stopped it goes on.

Parts lie in a hidden folder beside the final one, `.<name>.<hash of the settings>.partial`. A part counts when its
report is there, which is written last. When all are, their files become the shards of a TFDS dataset.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from revseg_jax.data.datasets.listing import Problem
from revseg_jax.data.prepared import FORMAT, MARKER, read_prepared
from revseg_jax.data.processes import process_pool
from revseg_jax.data.records import features, hash_record
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.paths import local_only, take_lock

PROBLEMS = "problems.jsonl"
Built = tuple[dict | None, list[Problem]]  # a video's record, None when it is unusable, and what is wrong with it


@dataclass(frozen=True)
class Part:
    """Videos that are written together. `build` must be picklable; `key` changes whenever its videos would."""

    split: str
    key: str
    videos: int
    build: Callable[[], Iterator[Built]] = field(repr=False)


@dataclass(frozen=True)
class PartReport:
    """What a finished part holds. `expressions` and `hashes` have one entry a record: [video, [expressions]] by id."""

    key: str
    expressions: list[list]
    hashes: list[str]
    frames: int
    objects: int
    skipped_videos: int
    problems: list[dict]


def write_dataset(
    out: str | Path,
    name: str,
    settings: dict[str, Any],
    parts: Callable[[], Sequence[Part]],
    problems: dict[str, Sequence[Problem]] | None = None,
    truth: dict[str, bool] | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a dataset and returns the content of its `prepared.json`.

    settings is everything that decides the content: a complete folder with equal settings is reused as it is, and
    `parts` is not called. problems: found before any part, by split. truth: by split, whether expressions without
    objects are so because nobody may know (default: no). strict: the first problem is an InputError, and so is a
    complete folder that was written in spite of problems.

    Raises InputError when the folder holds anything else or a split nothing usable, RunFailure when it cannot be
    written; what was done stays for the next time.
    """
    out = local_only(out)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will when read back
    if out.exists():
        return _reuse(out, settings, strict)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    work = out.parent / f".{out.name}.{digest}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with take_lock(work / "lock", f"another process is writing {work}: wait for it"), _nothing_for_nothing(work):
            if out.exists():  # another process has finished it meanwhile
                return _reuse(out, settings, strict)
            todo = list(parts())
            problems = problems if problems is not None else {part.split: () for part in todo}
            first = {split: list(found) for split, found in problems.items()}
            if strict and any(first.values()):
                raise InputError(next(found[0].message for found in first.values() if found))
            reports = _write_parts(work, todo, strict, workers, progress)
            prepared = _summarise(name, settings, todo, reports, first, truth or {})
            _finish(work, out, name, prepared, todo, reports, first)
            return prepared
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError
        if isinstance(error, RunFailure):
            raise
        raise RunFailure(f"cannot write the dataset {out}: {str(error).splitlines()[0]}") from None


@contextmanager
def _nothing_for_nothing(work: Path) -> Iterator[None]:
    """When the block refuses its input before a part is done, the work folder goes too."""
    try:
        yield
    except InputError:
        if not any(work.glob("part-*.json")):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _reuse(out: Path, settings: dict[str, Any], strict: bool) -> dict[str, Any]:
    prepared = read_prepared(out)
    if prepared["settings"] != settings:
        raise InputError(f"{out} holds a dataset with other settings: delete it or choose another folder")
    if strict and any(summary["problems"] for summary in prepared["summary"].values()):
        raise InputError(f"{out} was written in spite of the problems in {out / PROBLEMS}: mend them and delete it")
    return prepared


# --- parts -----------------------------------------------------------------------------------------------------------


def _write_parts(work: Path, parts: list[Part], strict: bool, workers: int, progress: bool) -> list[PartReport]:
    reports = [_read_report(work, number, part) for number, part in enumerate(parts)]
    if strict:  # what was written without it, in spite of problems
        reports = [None if report and report.problems else report for report in reports]
    missing = [number for number, report in enumerate(reports) if report is None]
    done = sum(part.videos for part, report in zip(parts, reports, strict=True) if report is not None)
    total = sum(part.videos for part in parts)
    with tqdm(total=total, initial=done, desc="prepare", unit="video", disable=not progress or None) as bar:
        if workers <= 1 or len(missing) <= 1:
            for number in missing:
                reports[number] = _write_part(work, number, parts[number], strict, bar.update)
            return reports
        with process_pool(min(workers, len(missing))) as pool:
            tasks = {pool.submit(_write_part, work, number, parts[number], strict): number for number in missing}
            for task in as_completed(tasks):
                reports[tasks[task]] = task.result()
                bar.update(parts[tasks[task]].videos)
    return reports


def _part_file(work: Path, number: int) -> Path:
    return work / f"part-{number:05d}.array_record"


def _read_report(work: Path, number: int, part: Part) -> PartReport | None:
    try:
        report = PartReport(**json.loads(_part_file(work, number).with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return report if report.key == part.key else None


def _write_part(
    work: Path, number: int, part: Part, strict: bool, tick: Callable[[], Any] = lambda: None
) -> PartReport:
    """Records go to the disk one by one; when they all are there, they and then their report are renamed into place.

    No report ever stands beside records that it does not describe: an attempt that fails leaves the part of an earlier
    one as it was.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, schema = _part_file(work, number), features()
    expressions, hashes, found, frames, objects, skipped = [], [], [], 0, 0, 0
    partial = path.with_suffix(".partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")  # each record by itself: random access
    try:
        for record, problems in part.build():
            if strict and problems:
                raise InputError(problems[0].message)
            found += [{"split": part.split, **asdict(problem)} for problem in problems]
            if record is None:
                skipped += 1
            else:
                writer.write(schema.serialize_example(record))
                digest = hashlib.sha256()
                hash_record(digest, record)
                hashes.append(digest.hexdigest())
                ids = [name.decode() for name in record["expression_ids"]]
                expressions.append([record["video_id"].decode(), ids])
                frames, objects = frames + len(record["frames"]), objects + len(record["object_ids"])
            tick()
    finally:
        writer.close()
    report = PartReport(part.key, expressions, hashes, frames, objects, skipped, found)
    report_file, temporary = path.with_suffix(".json"), path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(report)))
    report_file.unlink(missing_ok=True)
    os.replace(partial, path)
    os.replace(temporary, report_file)
    return report


# --- the whole -------------------------------------------------------------------------------------------------------


def _summarise(
    name: str,
    settings: dict[str, Any],
    parts: list[Part],
    reports: list[PartReport],
    first: dict[str, list[Problem]],
    truth: dict[str, bool],
) -> dict[str, Any]:
    digest, expressions, summary = hashlib.sha256(), {}, {}
    for split in first:
        of = [report for part, report in zip(parts, reports, strict=True) if part.split == split]
        digest.update(f"split {split};".encode())
        digest.update("".join(value for report in of for value in report.hashes).encode())
        expressions[split] = [video for report in of for video in report.expressions]
        if not expressions[split]:
            raise InputError(f"the split {split!r} of {name} holds nothing usable: {_first_message(of, first[split])}")
        causes = Counter(problem.cause for problem in first[split])
        causes.update(problem["cause"] for report in of for problem in report.problems)
        summary[split] = {
            "videos": len(expressions[split]),
            "expressions": sum(len(ids) for _, ids in expressions[split]),
            "frames": sum(report.frames for report in of),
            "objects": sum(report.objects for report in of),
            "skipped_videos": sum(report.skipped_videos for report in of),
            "problems": dict(sorted(causes.items())),
        }
    return {
        "format": FORMAT,
        "dataset": name,
        "settings": settings,
        "fingerprint": digest.hexdigest(),
        "truth": {split: truth.get(split, True) for split in first},
        "summary": summary,
        "expressions": expressions,
    }


def _first_message(reports: list[PartReport], first: list[Problem]) -> str:
    messages = [problem.message for problem in first] + [p["message"] for report in reports for p in report.problems]
    return messages[0] if messages else "it is empty"


def _finish(
    work: Path,
    out: Path,
    name: str,
    prepared: dict[str, Any],
    parts: list[Part],
    reports: list[PartReport],
    first: dict[str, list[Problem]],
) -> None:
    """Gathers the parts as a TFDS dataset in a folder of its own, which then becomes `out`."""
    import tensorflow_datasets as tfds

    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    splits = []
    for split in prepared["expressions"]:
        numbers = [n for n, part in enumerate(parts) if part.split == split and reports[n].expressions]
        for shard, number in enumerate(numbers):
            file = final / f"{name}-{split}.array_record-{shard:05d}-of-{len(numbers):05d}"
            try:
                os.link(_part_file(work, number), file)
            except OSError:  # a file system without hard links
                shutil.copyfile(_part_file(work, number), file)
        lengths = [len(reports[number].expressions) for number in numbers]
        size = sum(_part_file(work, number).stat().st_size for number in numbers)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.folder_dataset.write_metadata(data_dir=final, features=features(), split_infos=splits, check_data=False)
    with open(final / PROBLEMS, "w") as file:
        for split, problems in first.items():
            file.writelines(json.dumps({"split": split, **asdict(problem)}) + "\n" for problem in problems)
        for report in reports:
            file.writelines(json.dumps(problem) + "\n" for problem in report.problems)
    (final / MARKER).write_text(json.dumps(prepared) + "\n")
    os.rename(final, out)
    shutil.rmtree(work, ignore_errors=True)
