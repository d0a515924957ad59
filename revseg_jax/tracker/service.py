"""The gRPC service: checks every field, then lets the engine work. Status codes are those tracker.proto names."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from revseg_jax.errors import InputError
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker import tracker_pb2_grpc
from revseg_jax.tracker.clips import Clip, ClipNotHeld, ClipStore, ClipTooLarge, ClipWriter, Limits
from revseg_jax.tracker.engine import Engine, Prompt
from revseg_jax.tracker.wire import encode_masks


@dataclass(frozen=True)
class Description:
    """What Info tells about the model that runs here."""

    checkpoint: str
    config: str
    versions: dict[str, str]


class _CallerGone(Exception):
    """Nobody waits for this answer any more."""


class TrackerService(tracker_pb2_grpc.TrackerServicer):
    def __init__(self, engine: Engine, description: Description, limits: Limits):
        self.engine, self.description, self.limits = engine, description, limits
        self.store = ClipStore(limits)
        self._calls, self._draining = 0, False
        self._changed = threading.Condition()

    def PutClip(self, requests, context):
        with self._call(context):
            first = next(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise InputError("header: must come first")
            header = first.header
            writer = ClipWriter(
                header.height, header.width, header.encoding, header.frame_height, header.frame_width, self.limits
            )
            counts: list[bytes] = []
            for request in requests:
                part = request.WhichOneof("part")
                if part == "piece":
                    writer.add(request.piece.data, request.piece.last)
                elif part == "truth":
                    counts.extend(request.truth.counts)
                    if len(counts) > self.limits.max_frames:
                        raise InputError(f"truth: more than {self.limits.max_frames} masks")
                else:
                    raise InputError("part: frames or truth must follow the header")
            clip_id = header.clip_id
            if writer.pending or len(writer.offsets) > 1:
                clip = self.store.put(writer.close(clip_id))
                clip_id = clip.clip_id
            try:
                clip = self.store.get(clip_id)
            except ClipNotHeld:
                return pb.PutClipReply(clip_id=clip_id)
            if counts:
                clip.add_truth(header.truth_id, counts, self.limits)
            return pb.PutClipReply(clip_id=clip_id, clip_held=True, truth_held=header.truth_id in clip.truths)

    def Track(self, request, context):
        with self._call(context):
            clip = self.store.get(request.clip_id)
            prompts, ids = _prompts(request.prompts, clip, self.limits)
            frames = _frames(request.frames, clip)
            for which, at, masks in self.engine.track(clip, prompts, frames):
                found = zip(which, at, encode_masks(masks), strict=True)
                yield pb.TrackReply(masks=[pb.Mask(prompt_ids=ids[p], frame=t, counts=c) for p, t, c in found])

    def Score(self, request, context):
        with self._call(context):
            clip = self.store.get(request.clip_id)
            prompts, ids = _prompts(request.prompts, clip, self.limits)
            frames = list(range(clip.frames)) if not request.frames else _frames(request.frames, clip)
            column = {frame: n for n, frame in enumerate(frames)}
            truth = clip.truth(request.truth_id, frames)
            j, f = np.full((2, len(prompts), len(frames)), np.nan)
            for which, at, masks in self.engine.track(clip, prompts, frames):
                columns = [column[frame] for frame in at]
                j[which, columns] = region_similarity(masks, truth[columns])
                if not request.skip_contour:
                    f[which, columns] = contour_accuracy(masks, truth[columns])
                if not context.is_active():
                    raise _CallerGone
            scores = (
                pb.PromptScore(prompt_id=i, j=j[n].mean(), f=f[n].mean(), j_per_frame=j[n], f_per_frame=f[n])
                for n, same in enumerate(ids)
                for i in same
            )
            return pb.ScoreReply(scores=scores)

    def Info(self, request, context):
        return pb.InfoReply(
            checkpoint=self.description.checkpoint,
            config=self.description.config,
            versions=self.description.versions,
            device=str(self.engine.model.device),
            image_size=self.engine.image_size,
            max_frames=self.limits.max_frames,
            max_pixels=self.limits.max_pixels,
            max_prompts=self.limits.max_prompts,
            clips_held=len(self.store),
        )

    def drain(self, seconds: float) -> bool:
        """Refuses new calls and waits for those under way. False when some were still running after `seconds`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._calls == 0, seconds)

    @contextmanager
    def _call(self, context) -> Iterator[None]:
        """Counts the call, and turns what goes wrong in it into a status."""
        with self._changed:
            refused = self._draining
            self._calls += not refused
        if refused:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the sidecar is shutting down")
        try:
            yield
        except InputError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ClipNotHeld as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except (ClipTooLarge, MemoryError, OSError) as error:  # OSError: the disk that holds the clips is full
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{type(error).__name__}: {error}")
        except _CallerGone:
            context.abort(grpc.StatusCode.CANCELLED, "the caller is gone")
        except grpc.RpcError:  # the caller went away while its frames were read
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()


def _prompts(requested: Sequence[pb.Prompt], clip: Clip, limits: Limits) -> tuple[list[Prompt], list[list[int]]]:
    """The different prompts, and the ids each of them answers for."""
    if not 1 <= len(requested) <= limits.max_prompts:
        raise InputError(f"prompts: {len(requested)} of them, not between 1 and {limits.max_prompts}")
    ids: dict[Prompt, list[int]] = {}
    for prompt in requested:
        box = (prompt.x1, prompt.y1, prompt.x2, prompt.y2)
        if not 0 <= prompt.keyframe < clip.frames:
            raise InputError(f"keyframe: {prompt.keyframe} in a clip of {clip.frames} frames")
        if not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(f"box: {box} is empty or not finite")
        if box[2] <= 0 or box[3] <= 0 or box[0] >= clip.width or box[1] >= clip.height:
            raise InputError(f"box: {box} lies outside the frame of {clip.width} x {clip.height} pixels")
        ids.setdefault((prompt.keyframe, box), []).append(prompt.prompt_id)
    return list(ids), list(ids.values())


def _frames(requested: Sequence[int], clip: Clip) -> list[int] | None:
    """The frames asked for; None means all."""
    if len(set(requested)) != len(requested) or any(frame >= clip.frames for frame in requested):
        raise InputError(f"frames: must be different and below {clip.frames}")
    return list(requested) or None
