"""ReasonSeg: images as clips of one frame, targets as polygons, regions to be ignored as the object VOID.

Where both lie one over the other the smaller polygon counts, as in LISA's reader (utils/data_processing.py). Polygons
are of the images as their EXIF data want them shown.

{train,val,test}/<image>.jpg with <image>.json beside it: "text", "shapes": [{"label", "points"}]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from revseg_jax.data.datasets.listing import (
    ListedExpression,
    ListedVideo,
    Listing,
    Problem,
    as_list,
    read_json,
)
from revseg_jax.data.datasets.masks import polygon_masks
from revseg_jax.data.natural_order import natural
from revseg_jax.data.records import VOID
from revseg_jax.errors import InputError

SPLITS = ("train", "val", "test")
FPS = 1.0
TARGET = "target"


def meta_file(source: Path, split: str) -> Path:
    """A split is there when its folder is."""
    return source / split


def read(source: Path, split: str) -> Listing:
    images = sorted((source / split).glob("*.jpg"), key=lambda path: natural(path.stem))
    if not images:
        raise InputError(f"{source / split} holds no JPEG images: is --source the dataset's own folder?")
    videos, problems = [], []
    for image in images:
        try:
            videos.append(_image(image, read_json(image.with_suffix(".json"))))
        except InputError as error:
            problems.append(Problem("bad annotation", image.stem, str(error)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"{image.with_suffix('.json')} is no annotation of ReasonSeg: {error!r}"
            problems.append(Problem("bad annotation", image.stem, message))
    return Listing(videos, FPS, problems=tuple(problems))


def _polygon(points: list[list[float]]) -> list[tuple[float, float]]:
    """Raises TypeError or ValueError for what is no polygon."""
    polygon = [(float(x), float(y)) for x, y in points]
    if not np.isfinite(polygon).all():
        raise ValueError("a point that is not finite")
    return polygon


def _image(image: Path, annotation: dict) -> ListedVideo:
    labelled = [(shape["label"].lower(), _polygon(shape["points"])) for shape in annotation["shapes"]]
    # "flag" is a mark of the annotators.
    shapes = [(VOID if "ignore" in label else TARGET, points) for label, points in labelled if label != "flag"]
    objects = (TARGET,) if any(name == TARGET for name, _ in shapes) else ()
    expressions = tuple(
        ListedExpression(str(number), text, "reasoning", objects)
        for number, text in enumerate(as_list(annotation["text"]))
    )
    files = (image.with_suffix(".json"),)
    return ListedVideo(image.stem, (image,), expressions, files, partial(polygon_masks, shapes))
