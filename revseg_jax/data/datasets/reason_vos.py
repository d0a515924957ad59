"""ReasonVOS: for evaluation only; expressions as a list, one folder of mask images an object.

JPEGImages/<video>   Annotations/{source}_{video}_{obj_id}/*.png   meta_expressions.json

An expression's id is its object's, as in everybody's folders of predictions, unless two expressions share the object.
"""

from __future__ import annotations

from collections import Counter
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
    found = [(number, str(expression["obj_id"]), expression) for number, expression in expressions_of(video)]
    shared = Counter(obj for _, obj, _ in found)
    expressions = tuple(
        ListedExpression(
            obj if shared[obj] == 1 else str(expression.get("exp_id", number)),
            expression["exp_text"],
            "reasoning",
            (obj,),
        )
        for number, obj, expression in found
    )
    masks = {
        obj: [source / "Annotations" / f"{video['source']}_{name}_{obj}" / f"{frame.stem}.png" for frame in frames]
        for obj in shared
    }
    return ListedVideo(name, frames, expressions, partial(image_masks, name, masks))
