"""How a video with its objects and expressions lies in an array_record file: one record a video, nothing stored twice.

TFDS serialises nested sequences of unknown lengths only with TensorFlow installed, so the lists are flat: the mask of
object o at frame t is `masks[o * T + t]`, and `expression_objects` is cut up by `expression_object_counts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from revseg_jax.data.clip import Clip, union

# Masks that no expression names: pixels that are not scored, and everything that is an object.
VOID, FOREGROUND = "void", "foreground"


@dataclass(frozen=True)
class VideoExpression:
    id: str
    query: str
    kind: str
    objects: tuple[int, ...]  # positions in the video's list of objects; the target is their union


@dataclass(frozen=True)
class VideoTruth:
    """What predictions of a video are scored against. `objects` maps ids to one COCO RLE or None a frame."""

    video_id: str
    height: int
    width: int
    frame_names: tuple[str, ...]
    objects: dict[str, list[dict | None]]
    expressions: list[VideoExpression]


def features():
    """The TFDS features of a record."""
    import tensorflow_datasets as tfds

    text = tfds.features.Tensor(shape=(), dtype=np.object_)  # bytes; Image features would need TensorFlow
    return tfds.features.FeaturesDict(
        {
            "video_id": text,
            "fps": np.float32,
            "height": np.int32,
            "width": np.int32,
            "frames": tfds.features.Sequence(text),
            "frame_names": tfds.features.Sequence(text),
            "object_ids": tfds.features.Sequence(text),
            "masks": tfds.features.Sequence(text),  # COCO RLE counts, empty where the object is absent
            "expression_ids": tfds.features.Sequence(text),
            "expression_queries": tfds.features.Sequence(text),
            "expression_kinds": tfds.features.Sequence(text),
            "expression_objects": tfds.features.Sequence(np.int32),
            "expression_object_counts": tfds.features.Sequence(np.int32),
        }
    )


def make_record(
    video_id: str,
    fps: float,
    height: int,
    width: int,
    frames: Sequence[bytes],
    frame_names: Sequence[str],
    objects: dict[str, Sequence[dict | None]],
    expressions: Sequence[VideoExpression],
) -> dict:
    """The record of a video. `objects` maps an object's id to one COCO RLE or None a frame.

    Raises ValueError when an object has not one mask a frame or an expression names an object that is not there.
    """
    if len(frame_names) != len(frames):
        raise ValueError(f"{video_id}: {len(frame_names)} names for {len(frames)} frames")
    for name, masks in objects.items():
        if len(masks) != len(frames):
            raise ValueError(f"{video_id}: object {name} has {len(masks)} masks for {len(frames)} frames")
    for expression in expressions:
        if not all(0 <= position < len(objects) for position in expression.objects):
            raise ValueError(f"{video_id}: expression {expression.id} names an object that is not there")
    return {
        "video_id": video_id.encode(),
        "fps": fps,
        "height": height,
        "width": width,
        "frames": list(frames),
        "frame_names": [name.encode() for name in frame_names],
        "object_ids": [name.encode() for name in objects],
        "masks": [b"" if rle is None else bytes(rle["counts"]) for masks in objects.values() for rle in masks],
        "expression_ids": [expression.id.encode() for expression in expressions],
        "expression_queries": [expression.query.encode() for expression in expressions],
        "expression_kinds": [expression.kind.encode() for expression in expressions],
        "expression_objects": [position for expression in expressions for position in expression.objects],
        "expression_object_counts": [len(expression.objects) for expression in expressions],
    }


def objects_of(record: dict) -> dict[str, list[dict | None]]:
    """One COCO RLE or None a frame for each object of a record, by its id."""
    total, size = len(record["frames"]), [int(record["height"]), int(record["width"])]
    masks = [{"size": size, "counts": counts} if counts else None for counts in record["masks"]]
    return {name.decode(): masks[o * total : (o + 1) * total] for o, name in enumerate(record["object_ids"])}


def expressions_of(record: dict) -> list[VideoExpression]:
    ends = np.cumsum(record["expression_object_counts"], dtype=np.int64)
    columns = (record[f"expression_{name}"] for name in ("ids", "queries", "kinds"))
    return [
        VideoExpression(*(text.decode() for text in texts), tuple(map(int, record["expression_objects"][start:end])))
        for *texts, start, end in zip(*columns, [0, *ends[:-1]], ends, strict=True)
    ]


def truth_of(record: dict) -> VideoTruth:
    return VideoTruth(
        video_id=record["video_id"].decode(),
        height=int(record["height"]),
        width=int(record["width"]),
        frame_names=tuple(name.decode() for name in record["frame_names"]),
        objects=objects_of(record),
        expressions=expressions_of(record),
    )


def clip_of(record: dict, position: int) -> Clip:
    """The Clip of one expression (by position) of a record."""
    expression, objects = expressions_of(record)[position], list(objects_of(record).values())
    named = [objects[o] for o in expression.objects]
    masks = tuple(union([of[t] for of in named]) for t in range(len(record["frames"])))
    return Clip(
        video_id=record["video_id"].decode(),
        expression_id=expression.id,
        query=expression.query,
        kind=expression.kind,
        fps=float(record["fps"]),
        height=int(record["height"]),
        width=int(record["width"]),
        frames=tuple(record["frames"]),
        masks=masks,
        frame_names=tuple(name.decode() for name in record["frame_names"]),
    )


def hash_record(digest: hashlib._Hash, record: dict) -> None:
    """Adds a record's content to a running hash, in a form that depends neither on file layout nor on dict order."""
    for key in sorted(record):
        value = record[key]
        items = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        digest.update(f"{key}:{len(items)};".encode())
        for item in items:
            item = item if isinstance(item, bytes) else repr(np.float32(item).item()).encode()
            digest.update(f"{len(item)}:".encode() + item)
