"""Masks as the datasets store them -> COCO RLEs: run lengths, palette images, one image an object, polygons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError
from pycocotools import mask as coco

from revseg_jax.data.clip import encode_mask, union
from revseg_jax.data.datasets.listing import Masks, Problem
from revseg_jax.data.records import VOID
from revseg_jax.data.run_lengths import run_lengths
from revseg_jax.errors import InputError

VOID_PIXEL = 255  # of palette images: neither object nor background


def run_length_masks(
    video: str, objects: dict[str, list], frames: int, file: Path, height: int, width: int
) -> dict[str, Masks | Problem]:
    """From lists of COCO RLEs (compressed or not; null: absent; a list: the parts of one mask)."""
    found: dict[str, Masks | Problem] = {}
    for name, rles in objects.items():
        try:
            if not isinstance(rles, list) or len(rles) != frames:
                count = len(rles) if isinstance(rles, list) else "no list of"
                raise InputError(f"{count} masks for {frames} frames")
            found[name] = [_run_length_mask(rle, t, height, width) for t, rle in enumerate(rles)]
        except InputError as error:
            found[name] = Problem("bad mask", video, f"{file}: video {video}, annotation {name}: {error}")
    return found


def _run_length_mask(rle: dict | list | None, frame: int, height: int, width: int) -> dict | None:
    if isinstance(rle, list):
        return union([_run_length_mask(part, frame, height, width) for part in rle])
    if rle is None:
        return None
    try:
        size, counts = list(rle["size"]), rle["counts"]
        if size != [height, width]:
            raise InputError(f"the mask of frame {frame} is {size[1]}x{size[0]} pixels, the frame {width}x{height}")
        if isinstance(counts, str):
            counts = counts.encode()
        runs = np.array(counts) if isinstance(counts, list) else run_lengths(counts)
        if (runs < 0).any() or runs.sum() != height * width:
            raise InputError(f"the runs of frame {frame} do not fill the mask")
        if not runs[1::2].any():
            return None
        return {"size": size, "counts": counts} if isinstance(counts, bytes) else coco.frPyObjects(rle, height, width)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the mask of frame {frame} is no COCO RLE") from None


def palette_masks(
    video: str, files: Sequence[Path], objects: Sequence[str], with_unnamed: bool, height: int, width: int
) -> dict[str, Masks | Problem]:
    """From one image a frame whose pixel values are the objects' ids. Pixels of 255 become the object VOID.

    with_unnamed: behind the given objects come those of the first image that are not among them.
    """
    try:
        images = [_ids(file, height, width) for file in files]
    except InputError as error:
        return dict.fromkeys(objects, Problem("bad mask", video, f"video {video}: {error}"))
    unnamed = [name for name in _numbered(images[0]) if name not in objects] if with_unnamed else []
    found: dict[str, Masks | Problem] = {}
    for name in [*objects, *unnamed]:
        if name.isdecimal() and 0 < int(name) < VOID_PIXEL:
            found[name] = [encode_mask(image == int(name)) for image in images]
        else:
            found[name] = Problem("unknown object", video, f"video {video}: object {name!r} is no pixel value 1..254")
    void = [encode_mask(image == VOID_PIXEL) for image in images]
    return found | ({VOID: void} if any(void) else {})


def _numbered(image: np.ndarray) -> list[str]:
    """Ids 1 ... n of the objects of an image [height, width] of ids, n its highest id.

    This is how davis2017-evaluation counts (DAVIS.get_all_masks): an id that is left out counts as an empty object.
    """
    return [str(value) for value in range(1, int(image[image != VOID_PIXEL].max(initial=0)) + 1)]


def image_masks(video: str, objects: dict[str, Sequence[Path]], height: int, width: int) -> dict[str, Masks | Problem]:
    """From one image a frame and object; what is not 0, in any channel, is the object."""
    found: dict[str, Masks | Problem] = {}
    for name, files in objects.items():
        try:
            found[name] = [encode_mask(np.any(_channels(file, height, width), 0)) for file in files]
        except InputError as error:
            found[name] = Problem("bad mask", video, f"video {video}: {error}")
    return found


def polygon_masks(
    shapes: Sequence[tuple[str, Sequence[tuple[float, float]]]], height: int, width: int
) -> dict[str, Masks | Problem]:
    """From (object, polygon [(x, y), ...]) pairs of a one-frame clip, painted as LISA does (get_mask_from_json).

    The polygons are painted one over the other, the largest first, so that a pixel belongs to one object only. Areas
    are counts of the pixels drawn inside the frame; of equal ones the later is painted first. Pillow draws here and
    OpenCV there: their pixels can differ along the outlines.
    """
    drawn = [_polygon(points, height, width) for _, points in shapes]
    objects = list(dict.fromkeys(name for name, _ in shapes))
    owner = np.full((height, width), -1, np.int16)
    for number in np.argsort([mask.sum() for mask in drawn], kind="stable")[::-1]:
        owner[drawn[number]] = objects.index(shapes[number][0])
    return {name: [encode_mask(owner == position)] for position, name in enumerate(objects)}


def _polygon(polygon: Sequence[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """bool [height, width]: a filled polygon with its outline."""
    canvas = Image.new("1", (width, height))
    draw, points = ImageDraw.Draw(canvas), [(int(x), int(y)) for x, y in polygon]
    draw.polygon(points, fill=1, outline=1) if len(points) > 1 else draw.point(points, fill=1)
    return np.array(canvas)


def _ids(file: Path, height: int, width: int) -> np.ndarray:
    """Pixel values [height, width] of a palette or grey image; a coloured one is grey when all channels agree."""
    first, *others = _channels(file, height, width)
    if any((first != other).any() for other in others):
        raise InputError(f"{file} is in colour, so its pixels are no ids: it must be a palette or grey image")
    return first


def _channels(file: Path, height: int, width: int) -> list[np.ndarray]:
    """Pixel values [height, width] of each channel: of one, or in other than palette and grey images of three."""
    try:
        with Image.open(file) as image:
            bands = [image] if image.mode in ("P", "L", "1", "I;16") else image.convert("RGB").split()
            found = [np.asarray(band) for band in bands]
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if found[0].shape != (height, width):
        raise InputError(f"{file} is {found[0].shape[1]}x{found[0].shape[0]} pixels, the frame {width}x{height}")
    return found
