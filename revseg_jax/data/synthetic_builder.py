"""TFDS builder of the synthetic benchmark."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from revseg_jax.data.clip import encode_mask
from revseg_jax.data.frames import encode_frame
from revseg_jax.data.prepared import Summary, write_prepared
from revseg_jax.data.records import VideoExpression, features, make_record
from revseg_jax.data.synthetic import DIFFICULTIES, VERSION, Difficulty, Scene, render
from revseg_jax.errors import InputError

REVERSED = "test_reversed"  # the test clips played backwards, with their queries asked anew


class SyntheticClips(tfds.core.GeneratorBasedBuilder):
    """Clips of `revseg_jax.data.synthetic`, one record a video."""

    name = "synthetic_clips"
    VERSION = tfds.core.Version(f"{VERSION}.0.0")

    def __init__(
        self, *, difficulty: Difficulty, clips: dict[str, int], seed: int, summary: Summary, progress, **kwargs
    ):
        self._difficulty, self._clips, self._seed = difficulty, clips, seed
        self._summary, self._progress = summary, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Records stay in the order of their seeds; shuffling is the reading pipeline's business.
        return tfds.core.DatasetInfo(builder=self, features=features(), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split, wanted in self._clips.items() if wanted}

    def _generate_examples(self, split):
        return self._summary.watch(split, self._records(split, self._clips[split]))

    def _records(self, split: str, wanted: int) -> Iterator[dict]:
        """The first `wanted` scenes, counting up from the seed, that have at least one query."""
        first = self._seed << 32
        with tqdm(total=wanted, desc=f"{split} clips", unit="clip", disable=not self._progress) as bar:
            of, reverse = (split, False) if split != REVERSED else ("test", True)
            scenes = (render(first + i, self._difficulty, of, reverse=reverse) for i in itertools.count())
            for scene in itertools.islice((scene for scene in scenes if scene.expressions), wanted):
                yield scene_record(f"{split}-{scene.seed - first:06d}", scene)
                bar.update()


def scene_record(video_id: str, scene: Scene) -> dict:
    """The record of a scene; objects are numbered from back to front."""
    size = scene.difficulty.size
    return make_record(
        video_id,
        scene.fps,
        size,
        size,
        [encode_frame(frame) for frame in scene.frames],
        {str(k): [encode_mask(mask) for mask in scene.masks[:, k]] for k in range(len(scene.objects))},
        [VideoExpression(str(i), e.query, e.kind, (e.target,)) for i, e in enumerate(scene.expressions)],
    )


def prepare_synthetic(
    out_dir: str | Path,
    difficulty: Difficulty | str,
    train_clips: int,
    test_clips: int,
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Writes a folder of synthetic clips; returns its fingerprint (sha256).

    Splits are `train`, `test` and `test_reversed`, the test clips played backwards with their queries asked anew.

    An already complete folder with the same settings is reused. The test split holds (colour, shape) pairs that train
    never shows. Raises InputError for bad arguments or a folder that holds something else, RunFailure when it cannot be
    written.
    """
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise InputError(f"difficulty {difficulty} is not one of {', '.join(DIFFICULTIES)}")
        difficulty = DIFFICULTIES[difficulty]
    clips = {"train": train_clips, "test": test_clips, REVERSED: test_clips}
    if min(clips.values()) < 0 or not any(clips.values()):
        raise InputError(f"cannot write {train_clips} train and {test_clips} test clips: at least one is needed")
    if not 0 <= seed < 2**31:
        raise InputError(f"seed={seed} is not between 0 and {2**31 - 1}")
    settings = {
        "dataset": SyntheticClips.name,
        "version": VERSION,
        "difficulty": dataclasses.asdict(difficulty),
        "clips": clips,
        "seed": seed,
    }

    def make_builder(data_dir: str, summary: Summary) -> SyntheticClips:
        return SyntheticClips(
            data_dir=data_dir, difficulty=difficulty, clips=clips, seed=seed, summary=summary, progress=progress
        )

    return write_prepared(out_dir, make_builder, settings)
