"""ReVOS: videos in nested folders, three types of expressions, and the masks of everything that is an object.

JPEGImages/<source>/.../<video>   mask_dict.json   mask_dict_foreground.json   meta_expressions_{train_,valid_}.json
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from revseg_jax.data.datasets.listing import Listing, read_json
from revseg_jax.data.datasets.meta_expressions import videos_with_mask_dict
from revseg_jax.data.records import FOREGROUND

SPLITS = ("train", "valid")
FPS = 6.0  # from five sources; the files do not say
KINDS = {0: "referring", 1: "reasoning", 2: "non-existent"}


def meta_file(source: Path, split: str) -> Path:
    return source / f"meta_expressions_{split}_.json"


@lru_cache(maxsize=1)
def _masks(path: Path, modified: int) -> dict[str, list]:
    """Both splits share this large file: it is read once, unless it has been modified."""
    return read_json(path)


def read(source: Path, split: str) -> Listing:
    masks = source / "mask_dict.json"
    extra = (source / "mask_dict_foreground.json",) if split == "valid" else ()
    foreground = read_json(extra[0]) if extra else {}
    videos = videos_with_mask_dict(
        meta_file(source, split),
        source / "JPEGImages",
        _masks(masks, masks.stat().st_mtime_ns if masks.exists() else 0),
        (masks, *extra),
        kind_of=lambda expression: KINDS.get(_type(expression), "unknown"),
        absent=lambda expression: _type(expression) == 2,
        extra_masks=lambda video: {FOREGROUND: foreground[video]["masks_rle"]} if video in foreground else {},
    )
    return Listing(videos, FPS)


def _type(expression: dict) -> int:
    return int(expression.get("type_id", 0))
