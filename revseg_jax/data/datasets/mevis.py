"""MeViS: several objects an expression, as lists of `anno_id` into mask_dict.json. The truth of valid is not public.

{train,valid_u,valid}/{JPEGImages,meta_expressions.json}   mask_dict.json in train and valid_u
"""

from __future__ import annotations

from pathlib import Path

from revseg_jax.data.datasets.listing import Listing, read_json
from revseg_jax.data.datasets.meta_expressions import videos_with_mask_dict

SPLITS = ("train", "valid_u", "valid")
FPS = 6.0  # 79 frames and 13.2 s a video on average


def meta_file(source: Path, split: str) -> Path:
    return source / split / "meta_expressions.json"


def read(source: Path, split: str) -> Listing:
    masks, truth = source / split / "mask_dict.json", split != "valid"
    mask_dict = read_json(masks) if truth else None
    images = source / split / "JPEGImages"
    videos = videos_with_mask_dict(meta_file(source, split), images, mask_dict, (masks,), lambda expression: "motion")
    return Listing(videos, FPS, truth)
