"""What a download holds, before any frame or mask is read: videos, their files and expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's way to write a character in two halves; one may be missing
Masks = list[dict | None]  # one COCO RLE a frame, None where the object is absent


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data. `cause` is one of a few words that are counted, `message` names file and id."""

    cause: str
    video: str
    message: str
    expression: str | None = None


@dataclass(frozen=True)
class ListedExpression:
    id: str
    query: str
    kind: str  # the dataset's own type of query
    objects: tuple[str, ...]  # ids; the target is their union
    may_be_absent: bool = False  # no object is right: the query asks for something that is not there


@dataclass(frozen=True)
class ListedVideo:
    """`read_masks(height, width)` gives each object's masks, or the Problem that it has; it must be picklable.
    `mask_files` are those that the masks come from: a video whose files change is built again."""

    id: str
    frames: tuple[Path, ...]
    expressions: tuple[ListedExpression, ...]
    mask_files: tuple[Path, ...]
    read_masks: Callable[[int, int], dict[str, Masks | Problem]] = field(repr=False)


@dataclass(frozen=True)
class Listing:
    """One split. `truth`: whether its masks are public; without, expressions have no objects. `fps` of the frames."""

    videos: list[ListedVideo]
    fps: float
    truth: bool = True
    problems: tuple[Problem, ...] = ()


def no_masks(height: int, width: int) -> dict[str, Masks | Problem]:
    """`read_masks` of a split whose truth is not public."""
    return {}


def read_json(path: Path) -> Any:
    """Raises InputError when the file is missing or no JSON. Some published files are in Windows' code page."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: is --source the dataset's own folder?") from None
    for encoding in ("utf-8", "cp1252"):
        try:
            text = content.decode(encoding)
            tree = json.loads(text)
            if SURROGATE.search(text):
                json.dumps(tree, ensure_ascii=False).encode()
            return tree
        except UnicodeDecodeError:
            continue
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise InputError(f"{path} holds {half!a}, half a character that no file can take: mend its text") from None
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            raise InputError(f"{path} is no JSON: {error}") from None
    raise InputError(f"{path} is neither UTF-8 nor cp1252 text")


def as_list(value: Any) -> list:
    """Ids stand as a list, a number or a text, depending on the dataset and the split."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
