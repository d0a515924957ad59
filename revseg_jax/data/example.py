"""What a prompt needs of its clip, in fixed shapes. Worker processes make it: nothing here imports jax or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from revseg_jax.config import ChainConfig
from revseg_jax.data.clip import Clip, boxes_and_areas
from revseg_jax.data.frames import decode_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """What one prompt needs: N = chain.frames slots of which the first n = frame_count are filled.

    `boxes`, `areas`, `masks` and `size` are in pixels of the ORIGINAL frames. Filled slots that are absent from a frame
    have zero boxes and areas; so have padding slots, which must be left out of a minimum over frames. Padding slots of
    `frames` repeat the last frame, since the policy fuses frames in pairs.
    """

    index: int  # running number of the prompt over all epochs; the same for any number of processes
    video_id: str
    expression_id: str
    query: str
    kind: str
    fps: float  # of the original clip
    seconds: float  # duration of the whole clip
    size: np.ndarray  # int32 [2], height and width
    frames: np.ndarray  # uint8 [N, S, S, 3], S = chain.frame_size
    frame_count: int  # n
    sampled: np.ndarray  # int64 [N], original frame index of each slot; -1 in padding
    boxes: np.ndarray  # float32 [N, 4], x1, y1, x2, y2, half-open
    areas: np.ndarray  # float32 [N], areas of the boxes
    jpegs: tuple[bytes, ...]  # [n], the sampled frames as they came: for the keyframe and for the tracker's clip
    masks: tuple[dict | None, ...]  # [n], COCO RLE at the sampled frames


@dataclass(frozen=True)
class Batch:
    """B Examples: arrays stacked along a new first axis (numbers become arrays [B]), all else in tuples [B]."""

    index: np.ndarray  # int64 [B]
    video_id: tuple[str, ...]
    expression_id: tuple[str, ...]
    query: tuple[str, ...]
    kind: tuple[str, ...]
    fps: np.ndarray  # float32 [B]
    seconds: np.ndarray  # float32 [B]
    size: np.ndarray  # int32 [B, 2]
    frames: np.ndarray  # uint8 [B, N, S, S, 3]
    frame_count: np.ndarray  # int32 [B]
    sampled: np.ndarray  # int64 [B, N]
    boxes: np.ndarray  # float32 [B, N, 4]
    areas: np.ndarray  # float32 [B, N]
    jpegs: tuple[tuple[bytes, ...], ...]
    masks: tuple[tuple[dict | None, ...], ...]

    def __len__(self) -> int:
        return len(self.index)


def make_example(clip: Clip, index: int, chain: ChainConfig) -> Example:
    """The Example of a clip. Decodes its sampled frames and nothing else."""
    if not clip.frames:
        raise InputError(f"video {clip.video_id} has no frames")
    sampled = sample_frames(len(clip.frames), chain.frames)
    count, padding = len(sampled), chain.frames - len(sampled)
    jpegs, masks = tuple(clip.frames[t] for t in sampled), tuple(clip.masks[t] for t in sampled)
    frames = [decode_square(jpeg, chain.frame_size) for jpeg in jpegs]
    boxes, areas = boxes_and_areas(masks, clip.height, clip.width)
    return Example(
        index=index,
        video_id=clip.video_id,
        expression_id=clip.expression_id,
        query=clip.query,
        kind=clip.kind,
        fps=clip.fps,
        seconds=clip.seconds,
        size=np.array([clip.height, clip.width], np.int32),
        frames=np.stack(frames + frames[-1:] * padding),
        frame_count=count,
        sampled=np.pad(sampled, (0, padding), constant_values=-1),
        boxes=np.pad(boxes, ((0, padding), (0, 0))),
        areas=np.pad(areas, (0, padding)),
        jpegs=jpegs,
        masks=masks,
    )


_SCALARS = {"index": np.int64, "fps": np.float32, "seconds": np.float32, "frame_count": np.int32}


def stack(examples: Sequence[Example]) -> Batch:
    """One Batch of Examples made with the same ChainConfig."""
    columns = {field.name: [getattr(example, field.name) for example in examples] for field in fields(Example)}
    for name, values in columns.items():
        if name in _SCALARS:
            columns[name] = np.array(values, _SCALARS[name])
        else:
            columns[name] = np.stack(values) if isinstance(values[0], np.ndarray) else tuple(values)
    return Batch(**columns)
