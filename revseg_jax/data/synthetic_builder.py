"""The synthetic benchmark as a prepared folder."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from revseg_jax.data.clip import encode_mask
from revseg_jax.data.frames import encode_frame
from revseg_jax.data.processes import process_pool
from revseg_jax.data.records import VideoExpression, make_record
from revseg_jax.data.synthetic import DIFFICULTIES, VERSION, Difficulty, Scene, render
from revseg_jax.data.writer import Built, Part, write_dataset
from revseg_jax.errors import InputError

NAME = "synthetic"
REVERSED = "test_reversed"  # the test clips played backwards, with their queries asked anew
DRAWN_AT_ONCE = 32  # scenes a process: which of them have queries shows only then, so the last ones may be in vain


def records(difficulty: Difficulty, split: str, wanted: int, seed: int, workers: int) -> Iterator[Built]:
    """The first `wanted` scenes, counting up from the seed, that have at least one query."""
    make, block = partial(_record, difficulty, split, seed << 32), DRAWN_AT_ONCE * workers
    with contextlib.ExitStack() as stack:
        if workers > 1 and wanted > block:
            pool = stack.enter_context(process_pool(workers))
            blocks = (pool.map(make, range(first, first + block)) for first in itertools.count(step=block))
            drawn = itertools.chain.from_iterable(blocks)
        else:
            drawn = map(make, itertools.count())
        yield from ((record, []) for record in itertools.islice(filter(None, drawn), wanted))


def _record(difficulty: Difficulty, split: str, first: int, number: int) -> dict | None:
    of, reverse = (split, False) if split != REVERSED else ("test", True)
    scene = render(first + number, difficulty, of, reverse=reverse)
    return scene_record(f"{split}-{number:06d}", scene) if scene.expressions else None


def scene_record(video_id: str, scene: Scene) -> dict:
    """The record of a scene; objects are numbered from back to front."""
    size = scene.difficulty.size
    return make_record(
        video_id,
        scene.fps,
        size,
        size,
        [encode_frame(frame) for frame in scene.frames],
        [f"{t:05d}" for t in range(len(scene.frames))],
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
    workers: int = 1,
) -> dict[str, Any]:
    """Writes a folder of synthetic clips; returns the content of its `prepared.json`.

    Splits are `train`, `test` and `test_reversed`, the test clips played backwards with their queries asked anew.
    workers: processes that draw scenes; any number draws the same.

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
        "dataset": NAME,
        "version": VERSION,
        "difficulty": dataclasses.asdict(difficulty),
        "clips": clips,
        "seed": seed,
    }

    def parts() -> list[Part]:
        # One a split: which scenes have queries shows only when they are drawn.
        return [
            Part(split, f"{settings}", wanted, partial(records, difficulty, split, wanted, seed, workers))
            for split, wanted in clips.items()
            if wanted
        ]

    return write_dataset(out_dir, NAME, settings, parts, progress=progress)
