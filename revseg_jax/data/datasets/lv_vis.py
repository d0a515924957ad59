"""LV-VIS: the names of categories as expressions, the union of a category's objects as their target.

Either as VISA published it, train/{JPEGImages,mask_dict.json,meta_expressions.json}, or the official release: a
train_instances.json in the form of YouTube-VIS beside or inside train/.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path

from revseg_jax.data.datasets.listing import ListedExpression, ListedVideo, Listing, read_json
from revseg_jax.data.datasets.masks import run_length_masks
from revseg_jax.data.datasets.meta_expressions import videos_with_mask_dict
from revseg_jax.errors import InputError

SPLITS = ("train",)
FPS = 6.0  # the files do not say
KIND = "category"


def meta_file(source: Path, split: str) -> Path:
    """Of whichever of the two forms is there."""
    official = [folder / "train_instances.json" for folder in (source / split, source, source / "annotations")]
    return next((path for path in official if path.exists()), source / split / "meta_expressions.json")


def read(source: Path, split: str) -> Listing:
    meta, images = meta_file(source, split), source / split / "JPEGImages"
    if meta.name == "meta_expressions.json":
        masks = source / split / "mask_dict.json"
        return Listing(videos_with_mask_dict(meta, images, read_json(masks), (masks,), lambda expression: KIND), FPS)
    return Listing(_official(meta, images), FPS)


def _official(meta: Path, images: Path) -> list[ListedVideo]:
    content = read_json(meta)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["video_id"]].append(annotation)
        videos = sorted(content["videos"], key=lambda video: video["id"])
        return [_video(video, annotations[video["id"]], names, meta, images) for video in videos]
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{meta} is not in the form of YouTube-VIS: {error!r}") from None


def _video(video: dict, annotations: list[dict], names: dict[int, str], meta: Path, images: Path) -> ListedVideo:
    frames = tuple(images / name for name in video["file_names"])
    name = frames[0].parent.name
    members: dict[int, list[str]] = defaultdict(list)
    for annotation in annotations:
        members[annotation["category_id"]].append(str(annotation["id"]))
    expressions = tuple(
        # Names such as "traffic_light" or "bow_(weapon)".
        ListedExpression(str(number), names[category].replace("_", " "), KIND, tuple(objects))
        for number, (category, objects) in enumerate(sorted(members.items()))
    )
    masks = {str(annotation["id"]): annotation["segmentations"] for annotation in annotations}
    return ListedVideo(name, frames, expressions, (meta,), partial(run_length_masks, name, masks, len(frames), meta))
