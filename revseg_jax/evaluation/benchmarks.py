"""The benchmarks: which prepared split each one is, how it is scored, and what ReVSeg published on it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from revseg_jax.data.prepared import MARKER, read_prepared
from revseg_jax.errors import InputError
from revseg_jax.paths import local_only


@dataclass(frozen=True)
class Benchmark:
    """`protocol` names a function of `revseg_jax.evaluation.protocols`; `server` the layout of a submission's zip, for
    benchmarks whose truth is not public."""

    name: str
    title: str
    dataset: str
    split: str
    protocol: str
    server: str | None = None
    first_expression: bool = False  # only the first query of an image counts


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("ref_youtube_vos", "Ref-YouTube-VOS", "ref_youtube_vos", "valid", "expressions", "Annotations/"),
        Benchmark("ref_davis17", "Ref-DAVIS17", "ref_davis17", "valid", "davis"),
        Benchmark("mevis", "MeViS valid", "mevis", "valid", "expressions", ""),
        Benchmark("mevis_valid_u", "MeViS valid_u", "mevis", "valid_u", "expressions"),
        Benchmark("revos", "ReVOS", "revos", "valid", "revos"),
        Benchmark("reason_vos", "ReasonVOS", "reason_vos", "test", "reason_vos"),
        Benchmark("reason_seg_val", "ReasonSeg val", "reason_seg", "val", "images", first_expression=True),
        Benchmark("reason_seg_test", "ReasonSeg test", "reason_seg", "test", "images", first_expression=True),
        Benchmark("synthetic", "synthetic, held out", "synthetic", "test", "kinds"),
    )
}

# J, F and J&F of arXiv 2512.02835, by the title of our row. The paper states neither which of the two protocols its
# Ref-DAVIS17 follows nor which split its MeViS is, so its numbers stand beside all of them.
PUBLISHED = {
    "Ref-YouTube-VOS": (71.1, 75.2, 73.1),
    "Ref-DAVIS17 (a)": (77.4, 84.1, 80.8),
    "Ref-DAVIS17 (b)": (77.4, 84.1, 80.8),
    "MeViS valid": (56.1, 63.4, 59.8),
    "MeViS valid_u": (56.1, 63.4, 59.8),
    "ReVOS referring": (63.3, 68.1, 65.7),
    "ReVOS reasoning": (55.4, 61.8, 58.6),
    "ReVOS overall": (59.3, 65.0, 62.1),
    "ReasonVOS": (61.8, 67.7, 64.8),
}


def get_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name} is not one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def left_out(data: Path, split: str) -> str:
    """What `revseg prepare` could not use of a split, in words; none when all of it is there."""
    summary = read_prepared(data)["summary"][split]
    problems, videos = sum(summary["problems"].values()), summary["skipped_videos"]
    return f"prepare left out what {problems} problems concern, {videos} whole videos among it" if problems else ""


def find_data(folders: list[str], names: list[str]) -> dict[str, Path]:
    """The prepared folder of each benchmark asked for, in the papers' order whatever the order of `names`; "all" stands
    for every one whose data is there.

    folders: prepared ones, or folders that hold prepared ones. Raises InputError for a benchmark without data, or with
    data in two of them.
    """
    places: dict[Path, Path] = {}  # by where they really are: a folder that is named twice is one
    for folder in map(local_only, folders):
        inner = [] if (folder / MARKER).exists() else sorted(path.parent for path in folder.glob(f"*/{MARKER}"))
        places |= {path.resolve(): path for path in inner or [folder]}
    prepared: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in places.values():
        content = read_prepared(path)
        for split in content["expressions"]:
            prepared[content["dataset"], split].append(path)
    wanted = BENCHMARKS if names == ["all"] else {get_benchmark(name).name for name in names}
    chosen = [benchmark for benchmark in BENCHMARKS.values() if benchmark.name in wanted]
    for b in chosen:
        if len(several := prepared[b.dataset, b.split]) > 1:
            raise InputError(f"benchmark {b.name}: its data is in both {several[0]} and {several[1]}: name one of them")
    found = {b.name: prepared[b.dataset, b.split][0] for b in chosen if prepared[b.dataset, b.split]}
    lacking = [benchmark for benchmark in chosen if benchmark.name not in found]
    if lacking and names != ["all"]:
        b = lacking[0]
        raise InputError(
            f"benchmark {b.name}: no split {b.split!r} of {b.dataset} in {', '.join(folders) or 'no folder at all'}: "
            f"write it with `revseg prepare {b.dataset}` and name its folder with --data"
        )
    if not found:
        where = f"is in {', '.join(folders)}" if folders else "was named"
        raise InputError(f"no benchmark's data {where}: write it with `revseg prepare` and name its folder with --data")
    return found
