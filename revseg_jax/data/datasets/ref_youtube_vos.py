"""Ref-YouTube-VOS: one object an expression, named by its pixel value in palette images of every 5th frame.

    meta_expressions/{train,valid[,test]}/meta_expressions.json   train/{JPEGImages,Annotations}   valid/JPEGImages

The valid file lists the test videos as well; where the test file is there, its videos are taken away, and else those
whose frames are not there, as test's are no longer given away: what is left must then be as many as the server scores,
as the truth of valid is not public.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from revseg_jax.data.datasets.listing import ListedExpression, ListedVideo, Listing, Problem, as_list, no_masks
from revseg_jax.data.datasets.masks import palette_masks
from revseg_jax.data.datasets.meta_expressions import expressions_of, frames_of, read_videos

SPLITS = ("train", "valid")
FPS = 6.0  # every 5th frame of 30 a second
VALID_VIDEOS = 202


def meta_file(source: Path, split: str) -> Path:
    return source / "meta_expressions" / split / "meta_expressions.json"


def read(source: Path, split: str) -> Listing:
    videos, problems = palette_videos(source, split, truth=split == "train"), ()
    if split == "valid":
        videos, problems = _without_test(source, videos)
    return Listing(videos, FPS, truth=split == "train", problems=problems)


def _without_test(source: Path, videos: list[ListedVideo]) -> tuple[list[ListedVideo], tuple[Problem, ...]]:
    test = meta_file(source, "test")
    if test.exists():
        hidden = set(read_videos(test))
        return [video for video in videos if video.id not in hidden], ()
    there = [video for video in videos if (source / "valid" / "JPEGImages" / video.id).is_dir()] or videos
    if len(there) == VALID_VIDEOS:
        return there, ()
    count = f"{len(there)} videos, and the server scores {VALID_VIDEOS}"
    # Nobody can tell a video of test from one of valid that was not extracted.
    return there, (Problem("split of another size", "", f"without {test} the valid split has {count}"),)


def palette_videos(source: Path, split: str, truth: bool, with_unnamed: bool = False) -> list[ListedVideo]:
    """with_unnamed: also the masks of the first frame's objects that no expression names."""
    listed = []
    for name, video in read_videos(meta_file(source, split)).items():
        expressions = tuple(
            ListedExpression(
                number,
                expression["exp"],
                "referring",
                tuple(map(str, as_list(expression.get("obj_id")))) if truth else (),
            )
            for number, expression in expressions_of(video)
        )
        frames = frames_of(source / split / "JPEGImages" / name, video)
        annotations = tuple(source / split / "Annotations" / name / f"{frame.stem}.png" for frame in frames if truth)
        objects = list(dict.fromkeys(found for expression in expressions for found in expression.objects))
        read_masks = partial(palette_masks, name, annotations, objects, with_unnamed) if truth else no_masks
        listed.append(ListedVideo(name, frames, expressions, annotations, read_masks))
    return listed
