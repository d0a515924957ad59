"""Predictions on disk: <root>/<video>/<expression>/<frame>.png, the layout of the benchmarks' servers."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from revseg_jax.errors import InputError

INNER = ("Annotations", "predictions")  # folders that may stand between a root and its videos


def prediction_folder(root: Path, video: str, expression: str) -> Path:
    """An expression whose id holds a slash names its folder by itself, without its video's."""
    return root / expression if "/" in expression else root / video / expression


def write_prediction(folder: Path, frame_names: Sequence[str], masks: np.ndarray) -> None:
    """Grey PNGs of 0 and 255 from bool [T, H, W]; the folder appears complete or not at all."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    empty: bytes | None = None
    for name, mask in zip(frame_names, masks, strict=True):
        if mask.any():
            content = _png(mask)
        else:
            content = empty = empty or _png(mask)
        (partial / f"{name}.png").write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def clear_partial(root: Path) -> None:
    """Takes away what killed processes were writing; no other may be at it."""
    for partial in root.rglob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_prediction(folder: Path, frame_names: Sequence[str], height: int, width: int) -> np.ndarray | None:
    """bool [T, height, width], what is not 0 in any channel; None when the folder is not there.

    Raises InputError for a frame that is missing, unreadable or of another size.
    """
    if not folder.is_dir():
        return None
    masks = np.zeros((len(frame_names), height, width), bool)
    for mask, name in zip(masks, frame_names, strict=True):
        mask[:] = read_mask(folder / f"{name}.png", height, width)[0] > 0
    return masks


def read_mask(path: Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """Pixel values [height, width] and Pillow's mode of a prediction; of a coloured one the highest of each pixel."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            grey = mode in ("L", "P", "1", "I;16")
            pixels = np.asarray(image if grey else reduce(ImageChops.lighter, image.convert("RGB").split()))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: every frame needs a mask, an empty one too") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if pixels.shape != (height, width):
        raise InputError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the video {width}x{height}")
    return pixels, mode


def predictions_root(folder: Path, ids: Sequence[tuple[str, str]]) -> Path:
    """The folder in which the predictions lie: the given one, or the one inside it that servers want. ids: videos and
    expressions. Raises InputError when none of the videos is there."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    for root in (folder, *(folder / name for name in INNER)):
        if any(prediction_folder(root, *pair).parent.is_dir() for pair in ids):
            return root
    videos, example = len({video for video, _ in ids}), prediction_folder(Path(), *ids[0])
    raise InputError(f"{folder} has no folder of any of the {videos} videos, such as {example}")
