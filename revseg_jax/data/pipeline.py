"""From prepared folders to batches of fixed shapes, by Grain. Only the sampled frames are ever decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import grain
import numpy as np

from revseg_jax.config import ChainConfig
from revseg_jax.data.clip import Clip, boxes_and_areas
from revseg_jax.data.frames import decode_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.source import ClipSource
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


def _order(source: ClipSource, seed: int) -> grain.MapDataset:
    """Pairs of the source, endlessly. repeat() shuffles anew in each epoch; an epoch's last prompts share their step
    with the next one's first. In a mixture each folder has epochs of its own, and the folders take turns by weight."""
    if not source.weights:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    parts = source.parts()
    if not all(parts):
        raise InputError("a folder of a mixture holds no pair: leave it out of data.train and data.weights")
    ranges = [grain.MapDataset.range(part.start, part.stop) for part in parts]
    orders = [order.seed(seed + number).shuffle().repeat() for number, order in enumerate(ranges)]
    return grain.MapDataset.mix(orders, list(source.weights))


class _Examples:
    """This process's Examples, in the order in which training takes them."""

    def __init__(self, source: ClipSource, chain: ChainConfig, prompts: int, seed: int, process: int, processes: int):
        self._source, self._chain, self._prompts = source, chain, prompts
        self._share, self._first = prompts // processes, process * prompts // processes
        self._order = _order(source, seed)

    def __len__(self) -> int:
        return len(self._order) // self._prompts * self._share

    def __getitem__(self, position: int) -> Example:
        step, slot = divmod(position, self._share)
        index = step * self._prompts + self._first + slot
        return make_example(self._source[int(self._order[index])], index, self._chain)

    def __repr__(self) -> str:
        return f"Examples({self._source}, {self._share} from {self._first} of {self._prompts} prompts a step)"


def training_steps(
    source: ClipSource,
    chain: ChainConfig,
    prompts_per_step: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset:
    """An endless dataset of Batches, one a training step, globally shuffled anew in every epoch.

    Each of `process_count` processes gets a contiguous part of every step: joined in the order of the processes, the
    parts are the batch that a single process would get. `iter()` of the dataset gives an iterator with `get_state()`
    and `set_state()`, which resume exactly after the last batch taken. Frames of up to two coming steps are decoded
    ahead by `workers` threads (0 means one); their number changes nothing in batches or states. Raises InputError when
    the processes cannot share a step evenly.
    """
    if prompts_per_step % process_count:
        raise InputError(
            f"rollout.prompts_per_step={prompts_per_step} must be a multiple of the {process_count} processes"
        )
    examples = _Examples(source, chain, prompts_per_step, seed, process_index, process_count)
    # Threads rather than processes: decoding and resizing release the GIL, and neither pickling a gigabyte of frames a
    # step nor the slow end of Grain's worker processes (25 s each, when their queues are full) is worth it.
    share, threads = prompts_per_step // process_count, max(workers, 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * share, threads))
    return grain.MapDataset.source(examples).to_iter_dataset(options).batch(share, batch_fn=stack)
