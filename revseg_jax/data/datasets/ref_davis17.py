"""Ref-DAVIS17: the layout of Ref-YouTube-VOS with public truth and void pixels.

Expression i of a video is that of annotator i % 4 for object i // 4. Objects of a first frame that no expression names
are kept as well: the DAVIS 2017 evaluation counts them as not found.
"""

from __future__ import annotations

from pathlib import Path

from revseg_jax.data.datasets.listing import Listing
from revseg_jax.data.datasets.ref_youtube_vos import meta_file, palette_videos

SPLITS = ("train", "valid")
FPS = 24.0

__all__ = ["FPS", "SPLITS", "meta_file", "read"]


def read(source: Path, split: str) -> Listing:
    return Listing(palette_videos(source, split, truth=True, with_unnamed=True), FPS)
