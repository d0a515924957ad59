"""From a listed video to its record. What is wrong with the data becomes Problems; nothing is dropped without one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from revseg_jax.data.datasets.listing import ListedVideo, Problem
from revseg_jax.data.frames import encode_frame, upright
from revseg_jax.data.records import VideoExpression, make_record
from revseg_jax.errors import InputError


def build_record(
    video: ListedVideo, fps: float, truth: bool, training: bool = False
) -> tuple[dict | None, list[Problem]]:
    """The record of a video with the expressions that are usable, or None when there are none of them.

    A frame that is missing or unreadable makes a video unusable, a bad mask the expressions that name its object.
    training: targets that are visible in no frame teach nothing, and mostly stand for a wrong id; benchmarks count them
    """
    try:
        frames, (height, width) = _frames(video)
    except _BadFrame as bad:
        return None, [Problem(bad.cause, video.id, str(bad))]
    masks = video.read_masks(height, width)
    problems = [found for found in masks.values() if isinstance(found, Problem)]
    objects = {name: found for name, found in masks.items() if not isinstance(found, Problem)}
    positions = {name: position for position, name in enumerate(objects)}
    expressions = []
    for expression in video.expressions:

        def problem(cause: str, message: str, expression=expression) -> None:
            text = f"video {video.id}, expression {expression.id}: {message}"
            problems.append(Problem(cause, video.id, text, expression.id))

        unknown = [name for name in expression.objects if name not in masks]
        bad = [name for name in expression.objects if isinstance(masks.get(name), Problem)]
        query = expression.query.strip() if isinstance(expression.query, str) else ""
        if not query:
            problem("empty expression", "it has no text")
        elif unknown:
            problem("unknown object", f"there is no mask of {', '.join(unknown)}")
        elif bad:
            problem("expression of a bad mask", f"object {', '.join(bad)} cannot be used")
        elif truth and not expression.objects and not expression.may_be_absent:
            problem("expression without objects", "it names no object")
        elif training and expression.objects and not any(any(objects[name]) for name in expression.objects):
            problem("target never visible", f"object {', '.join(expression.objects)} is in no frame's mask")
        else:
            named = tuple(positions[name] for name in expression.objects)
            expressions.append(VideoExpression(expression.id, query, expression.kind, named))
    if not expressions:
        problems.append(Problem("video without usable expressions", video.id, f"video {video.id}: nothing to ask"))
        return None, problems
    names = [path.stem for path in video.frames]
    return make_record(video.id, fps, height, width, frames, names, objects, expressions), problems


class _BadFrame(InputError):
    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


def _frames(video: ListedVideo) -> tuple[list[bytes], tuple[int, int]]:
    """Upright JPEGs and the size that all of them have: height, width."""
    if not video.frames:
        raise _BadFrame("missing frame", f"video {video.id} has no frames")
    frames, size = [], None
    for path in video.frames:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise _BadFrame("missing frame", f"{path} is missing (video {video.id})") from None
        except OSError as error:
            raise _BadFrame("unreadable frame", f"{path} (video {video.id}): {error.strerror}") from None
        content, found = _upright(content, path, video.id)
        if size not in (None, found):
            sizes = f"{found[1]}x{found[0]} pixels, the frames before {size[1]}x{size[0]}"
            raise _BadFrame("frames of several sizes", f"{path} is {sizes} (video {video.id})")
        size = found
        frames.append(content)
    return frames, size


def _upright(content: bytes, path: Path, video: str) -> tuple[bytes, tuple[int, int]]:
    """A JPEG that can be decoded to its end, and its height and width.

    The very bytes, but of an image that its EXIF data want turned, as a camera held sideways writes it: that is encoded
    anew as it is shown, so that whoever decodes it sees the pixels that its masks are for. Annotators and the
    datasets' own readers saw it upright, too: OpenCV turns such images.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            shown = upright(image)
            if shown is not image:
                pixels = np.asarray(shown.convert("RGB"))
                return encode_frame(pixels), pixels.shape[:2]
            width, height = image.size
            image.draft("L", (width // 8, height // 8))  # reads all of it, but computes few pixels
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _BadFrame("unreadable frame", f"{path} (video {video}) is no readable JPEG: {error}") from None
    return content, (height, width)
