"""The `meta_expressions.json` and `mask_dict.json` that most of the datasets share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from revseg_jax.data.datasets.listing import ListedExpression, ListedVideo, as_list, no_masks, read_json
from revseg_jax.data.datasets.masks import run_length_masks
from revseg_jax.data.natural_order import natural
from revseg_jax.errors import InputError


def read_videos(path: Path) -> dict[str, dict]:
    """The videos of a meta_expressions.json, in natural order."""
    content = read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise InputError(f"{path} has no 'videos': is it a meta_expressions.json?")
    return {name: videos[name] for name in sorted(videos, key=natural)}


def expressions_of(video: dict) -> Iterator[tuple[str, dict]]:
    """(id, expression) by number: the files sort ids as texts, or hold a list."""
    expressions = video["expressions"]
    if isinstance(expressions, list):
        yield from ((str(number), expression) for number, expression in enumerate(expressions))
    else:
        yield from ((name, expressions[name]) for name in sorted(expressions, key=natural))


def frames_of(folder: Path, video: dict) -> tuple[Path, ...]:
    return tuple(folder / f"{video['frames'][t]}.jpg" for t in frame_order(video))


def frame_order(video: dict) -> list[int]:
    """Positions in the file's own list of frames, in natural order of the frames' names."""
    names = list(map(str, video["frames"]))
    return sorted(range(len(names)), key=lambda t: natural(names[t]))


def _reordered(masks: list, order: list[int]) -> list:
    """One mask a frame, in the given order; of another length as they are, for their reader to tell."""
    return [masks[t] for t in order] if len(masks) == len(order) else masks


def videos_with_mask_dict(
    meta: Path,
    images: Path,
    mask_dict: dict[str, list] | None,
    mask_files: tuple[Path, ...],
    kind_of: Callable[[dict], str],
    absent: Callable[[dict], bool] = lambda expression: False,
    extra_masks: Callable[[str], dict[str, list]] = lambda video: {},
) -> list[ListedVideo]:
    """Videos whose expressions name their objects by `anno_id` in a mask_dict (None: no public truth).

    mask_files: the mask_dict's, and then those of extra_masks, which gives a video's masks that no expression names.
    All masks stand in the order of the video's own list of frames, whatever that is, and get that of `frames_of`.
    """
    listed = []
    for name, video in read_videos(meta).items():
        expressions, wanted = [], {}
        for number, expression in expressions_of(video):
            objects = tuple(str(anno) for anno in as_list(expression.get("anno_id"))) if mask_dict is not None else ()
            wanted |= {anno: mask_dict[anno] for anno in objects if anno in mask_dict}
            expressions.append(
                ListedExpression(number, expression["exp"], kind_of(expression), objects, absent(expression))
            )
        frames = frames_of(images / name, video)
        files, read_masks = (), no_masks
        if mask_dict is not None:
            order = frame_order(video)
            masks = {anno: _reordered(rles, order) for anno, rles in (wanted | extra_masks(name)).items()}
            files, read_masks = mask_files, partial(run_length_masks, name, masks, len(frames), mask_files[0])
        listed.append(ListedVideo(name, frames, tuple(expressions), files, read_masks))
    return listed
