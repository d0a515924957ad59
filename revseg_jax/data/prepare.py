"""`revseg prepare`: a download becomes a prepared folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from revseg_jax.data.datasets import DATASETS
from revseg_jax.data.datasets.build import build_record
from revseg_jax.data.datasets.listing import ListedVideo, Listing
from revseg_jax.data.processes import cores
from revseg_jax.data.writer import PROBLEMS, Built, Part, write_dataset
from revseg_jax.errors import InputError
from revseg_jax.paths import local_only

VIDEOS_PER_PART = 8
TRAIN = "train"
VERSION = 4  # of how downloads are read: raise it when records of the same download would change


def prepare(
    dataset: str,
    source: str | Path,
    out: str | Path,
    splits: Sequence[str] = (),
    strict: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the given splits (none: all that the download holds) and returns the content of `prepared.json`.

    workers: processes; 0 takes all cores. Raises InputError for an unknown dataset or split, a source of another
    layout and, with `strict`, for the first problem in the data; RunFailure when the folder cannot be written.
    """
    if dataset not in DATASETS:
        raise InputError(f"dataset {dataset} is not one of {', '.join(DATASETS)}, synthetic")
    reader, source = DATASETS[dataset], local_only(source)
    if not source.is_dir():
        raise InputError(f"--source {source} is not a folder")
    unknown = [split for split in splits if split not in reader.SPLITS]
    if unknown:
        raise InputError(f"{dataset} has no split {unknown[0]!r}, only {', '.join(reader.SPLITS)}")
    if not splits:
        splits = [split for split in reader.SPLITS if reader.meta_file(source, split).exists()]
        if not splits:
            expected = reader.meta_file(source, reader.SPLITS[0])
            raise InputError(f"--source {source} does not look like {dataset}: {expected} is missing")
    settings = {"dataset": dataset, "version": VERSION, "source": str(source.resolve()), "splits": sorted(splits)}
    listings = {split: _read(dataset, source, split) for split in splits} if not local_only(out).exists() else {}
    return write_dataset(
        out,
        dataset,
        settings,
        lambda: [part for split, listing in listings.items() for part in _parts(split, listing)],
        problems={split: listing.problems for split, listing in listings.items()},
        truth={split: listing.truth for split, listing in listings.items()},
        strict=strict,
        workers=workers or cores(),
        progress=progress,
    )


def _read(dataset: str, source: Path, split: str) -> Listing:
    reader = DATASETS[dataset]
    try:
        return reader.read(source, split)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{reader.meta_file(source, split)} is not as {dataset} has it: {error!r}") from None


def _parts(split: str, listing: Listing) -> Iterator[Part]:
    for start in range(0, len(listing.videos), VIDEOS_PER_PART):
        videos = listing.videos[start : start + VIDEOS_PER_PART]
        content = [(v.id, v.expressions, [_stamp(file) for file in (*v.frames, *v.mask_files)]) for v in videos]
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        build = partial(_build, videos, listing.fps, listing.truth, split == TRAIN)
        yield Part(split, key, len(videos), build)


def _stamp(file: Path) -> tuple[str, int, int] | tuple[str]:
    """What changes when a file is mended: its size and time of change; of one that is missing the name alone."""
    try:
        stat = file.stat()
    except OSError:
        return (str(file),)
    return str(file), stat.st_size, stat.st_mtime_ns


def _build(videos: list[ListedVideo], fps: float, truth: bool, training: bool) -> Iterator[Built]:
    for video in videos:
        yield build_record(video, fps, truth, training)


def summary_text(prepared: dict[str, Any], out: str | Path) -> str:
    """What a person wants to know about a prepared folder."""
    columns = ("videos", "expressions", "frames", "objects", "skipped_videos")
    lines = [f"{'split':<14}" + "".join(f"{name.replace('_', ' '):>15}" for name in columns)]
    for split, summary in prepared["summary"].items():
        lines.append(f"{split:<14}" + "".join(f"{summary[name]:>15,}" for name in columns))
    for split, summary in prepared["summary"].items():
        lines += [f"{split}: {count:,} x {cause}" for cause, count in summary["problems"].items()]
    if any(summary["problems"] for summary in prepared["summary"].values()):
        lines.append(f"each one is named in {local_only(out) / PROBLEMS}")
    return "\n".join([*lines, f"fingerprint {prepared['fingerprint']}", f"written to {out}"])
