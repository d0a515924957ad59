"""Random access to the (video, expression) pairs of prepared folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from revseg_jax.data.clip import Clip
from revseg_jax.data.filtered import DECISIONS, fingerprint_without, read_dropped
from revseg_jax.data.prepared import read_prepared
from revseg_jax.data.records import VideoTruth, clip_of, truth_of
from revseg_jax.errors import InputError


class ClipSource:
    """`len(source)` pairs; `source[i]` is a Clip with all its frames, still encoded, and masks.

    Pairs are ordered by folder, video and expression; videos that `revseg filter` dropped are left out. Files are
    opened on first use, so that a source can be sent to worker processes; the last record is kept, since neighbouring
    pairs often share their video.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        split: str,
        weights: Sequence[float] = (),
        with_dropped: bool = False,
        with_truth: bool = False,
    ) -> None:
        """weights: of each folder in a mixture, any positive numbers; none: every pair alike. with_dropped: also the
        videos that `revseg filter` dropped. with_truth: the split must have masks. Raises InputError."""
        if not folders:
            raise InputError("no dataset folders given")
        if weights and (len(weights) != len(folders) or min(weights) <= 0):
            raise InputError(
                f"data.weights={list(weights)} must hold a positive number for each of {len(folders)} folders"
            )
        self.weights = tuple(weights)
        self.folders, self.split = [str(folder) for folder in folders], split
        self.fingerprints: list[str] = []
        total = 0  # dropped videos
        videos: list[tuple[int, int]] = []  # (folder, record) of each video
        self._ids: list[tuple[str, list[str]]] = []  # of each video: its id, its expressions' ids
        for number, folder in enumerate(self.folders):
            prepared = read_prepared(folder)
            if split not in prepared["expressions"]:
                there = ", ".join(prepared["expressions"])
                advice = "set data.train_split or data.test_split"
                raise InputError(f"{folder} has no split {split!r}, only {there}: {advice}")
            if with_truth and not prepared["truth"][split]:
                raise InputError(f"{folder}: the truth of the split {split!r} is not public: choose one that has masks")
            dropped = set() if with_dropped else read_dropped(folder, split)
            total += len(dropped)
            kept = [(n, item) for n, item in enumerate(prepared["expressions"][split]) if item[0] not in dropped]
            videos += [(number, record) for record, _ in kept]
            self._ids += [item for _, item in kept]
            self.fingerprints.append(fingerprint_without(prepared["fingerprint"], dropped))
        counts = [len(ids) for _, ids in self._ids]
        self._videos, self._ends = videos, np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - counts
        if len(self) == 0:
            cause = f": {DECISIONS}, of `revseg filter`, drops all of them" if total else ""
            raise InputError(f"the split {split!r} of {', '.join(self.folders)} has no expressions{cause}")
        self._readers: dict = {}
        self._last: tuple[int, dict] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        video = int(np.searchsorted(self._ends, index, side="right"))
        return clip_of(self._record(video), int(index - self._starts[video]))

    def parts(self) -> list[range]:
        """The pairs of each folder."""
        last = np.searchsorted([folder for folder, _ in self._videos], range(len(self.folders)), side="right")
        ends = [int(self._ends[videos - 1]) if videos else 0 for videos in last]
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def videos(self) -> int:
        return len(self._videos)

    def video(self, number: int) -> VideoTruth:
        """The masks and expressions of a video, by its position among all videos."""
        return truth_of(self._record(number))

    def ids(self) -> list[tuple[str, str]]:
        """(video, expression) of every pair, without reading any record."""
        return [(video, expression) for video, expressions in self._ids for expression in expressions]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}, "_last": None}

    def __repr__(self) -> str:
        return f"ClipSource({self.folders}, {self.split!r})"

    def _record(self, video: int) -> dict:
        last = self._last  # one read of the attribute: other threads may replace it meanwhile
        if last is not None and last[0] == video:
            return last[1]
        folder, position = self._videos[video]
        try:
            if folder not in self._readers:
                self._readers[folder] = _open(self.folders[folder], self.split)
            record = self._readers[folder][position]
        except MemoryError:
            raise
        except Exception as error:  # TFDS and array_record raise many kinds; all mean that the files are damaged
            raise InputError(
                f"{self.folders[folder]}: record {position} of {self.split!r} cannot be read from the array_record "
                f"files: {(str(error) or repr(error)).splitlines()[0]}"
            ) from None
        self._last = (video, record)
        return record


def _open(folder: str, split: str):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split)
