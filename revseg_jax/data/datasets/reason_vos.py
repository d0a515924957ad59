"""ReasonVOS: for evaluation only; expressions as a list, one folder of mask images an object.

JPEGImages/<video>   Annotations/{source}_{video}_{obj_id}/*.png   meta_expressions.json

An expression's id is its object's, as in everybody's folders of predictions. Where two expressions of a video share an
object, all expressions of that video have their own ids.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from revseg_jax.data.datasets.listing import ListedExpression, ListedVideo, Listing, natural
from revseg_jax.data.datasets.masks import image_masks
from revseg_jax.data.datasets.meta_expressions import expressions_of, read_videos

SPLITS = ("test",)
FPS = 6.0  # from four sources; the files do not say


def meta_file(source: Path, split: str) -> Path:
    return source / "meta_expressions.json"


def read(source: Path, split: str) -> Listing:
    return Listing([_video(source, *item) for item in read_videos(meta_file(source, split)).items()], FPS)


def _video(source: Path, name: str, video: dict) -> ListedVideo:
    folder = source / "JPEGImages" / name
    frames = tuple(sorted(folder.glob("*.jpg"), key=lambda path: natural(path.stem)))
    found = list(expressions_of(video))
    objects = [str(expression["obj_id"]) for _, expression in found]
    own = [str(expression.get("exp_id", number)) for number, expression in found]
    # They name folders of predictions. Numbers of objects and of expressions overlap: a video takes one sort only.
    ids = next(ids for ids in (objects, own, [number for number, _ in found]) if len(set(ids)) == len(ids))
    expressions = tuple(
        ListedExpression(name, expression["exp_text"], "reasoning", (obj,))
        for name, (_, expression), obj in zip(ids, found, objects, strict=True)
    )
    masks = {
        obj: [source / "Annotations" / f"{video['source']}_{name}_{obj}" / f"{frame.stem}.png" for frame in frames]
        for obj in dict.fromkeys(objects)
    }
    files = tuple(file for of_object in masks.values() for file in of_object)
    return ListedVideo(name, frames, expressions, files, partial(image_masks, name, masks))
