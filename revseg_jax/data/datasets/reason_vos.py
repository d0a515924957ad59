"""ReasonVOS: for evaluation only; expressions as a list, one folder of mask images an object.

JPEGImages/<video>   Annotations/{source}_{video}_{obj_id}/*.png   meta_expressions.json

An expression's id is its folder of predictions in the benchmark's own scripts (of VideoLISA, evaluation/reason_vos):
{source}_{video}_{obj_id}/{exp_id}. Numbers of objects and of expressions repeat within a video; a pair that does too is
told apart by the expression's place in the list.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from revseg_jax.data.datasets.listing import ListedExpression, ListedVideo, Listing
from revseg_jax.data.datasets.masks import image_masks
from revseg_jax.data.datasets.meta_expressions import expressions_of, read_videos
from revseg_jax.data.natural_order import natural

SPLITS = ("test",)
FPS = 6.0  # from four sources; the files do not say


def meta_file(source: Path, split: str) -> Path:
    return source / "meta_expressions.json"


def read(source: Path, split: str) -> Listing:
    return Listing([_video(source, *item) for item in read_videos(meta_file(source, split)).items()], FPS)


def _video(source: Path, name: str, video: dict) -> ListedVideo:
    frames = tuple(sorted((source / "JPEGImages" / name).glob("*.jpg"), key=lambda path: natural(path.stem)))
    found = list(expressions_of(video))
    objects = [str(expression["obj_id"]) for _, expression in found]
    of_object = {obj: f"{video['source']}_{name}_{obj}" for obj in objects}
    own = [f"{of_object[str(e['obj_id'])]}/{e.get('exp_id', number)}" for number, e in found]
    ids = [f"{one}_{number}" if own.count(one) > 1 else one for one, (number, _) in zip(own, found, strict=True)]
    expressions = tuple(
        ListedExpression(name, expression["exp_text"], "reasoning", (obj,))
        for name, (_, expression), obj in zip(ids, found, objects, strict=True)
    )
    masks = {
        obj: [source / "Annotations" / folder / f"{frame.stem}.png" for frame in frames]
        for obj, folder in of_object.items()
    }
    files = tuple(file for images in masks.values() for file in images)
    return ListedVideo(name, frames, expressions, files, partial(image_masks, name, masks))
