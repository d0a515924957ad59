"""The gRPC service: checks every field, then lets the engine work. Status codes are those tracker.proto names."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from revseg_jax.errors import InputError
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker import tracker_pb2_grpc
from revseg_jax.tracker.clips import Clip, ClipNotHeld, ClipStore, ClipWriter, Full, Limits
from revseg_jax.tracker.engine import CallerGone, Engine, Prompt
from revseg_jax.tracker.monitoring import LOGGER, CallRecord, log_call
from revseg_jax.tracker.wire import MESSAGE_BYTES, RETRY_KEY, decode_masks, encode_masks

RETRY_MILLISECONDS = 500  # a full sidecar's hint; clients spread around it
FARTHEST = 1 << 24  # pixels from a frame's corner to those of a box


@dataclass(frozen=True)
class Description:
    """What Info tells about the model that runs here."""

    checkpoint: str
    config: str
    model: str  # `revseg_jax.tracker.model.fingerprint`
    versions: dict[str, str]


class _Draining(Exception):
    """This sidecar is shutting down."""


class _OtherModel(Exception):
    """Another model is meant than the one that runs here."""


_CODES = {
    InputError: grpc.StatusCode.INVALID_ARGUMENT,
    ClipNotHeld: grpc.StatusCode.NOT_FOUND,
    MemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OSError: grpc.StatusCode.RESOURCE_EXHAUSTED,  # the disk that holds the clips is full
    CallerGone: grpc.StatusCode.CANCELLED,
    _Draining: grpc.StatusCode.UNAVAILABLE,
    _OtherModel: grpc.StatusCode.FAILED_PRECONDITION,
    Full: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class TrackerService(tracker_pb2_grpc.TrackerServicer):
    """watchers: told of each call that has ended, besides the log."""

    def __init__(self, engine: Engine, description: Description, limits: Limits):
        self.engine, self.description, self.limits = engine, description, limits
        self.store = ClipStore(limits)
        self._callers: Counter[str] = Counter()  # calls under way, by connection
        self.watchers: list[Callable[[CallRecord], None]] = [log_call]
        self._draining = False
        self._changed = threading.Condition()

    @property
    def calls(self) -> int:
        """How many are under way."""
        with self._changed:
            return self._callers.total()

    def PutClip(self, requests, context):
        with self._call(context, "PutClip") as record:
            first = next(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise InputError("header: must come first")
            header = first.header
            clip_id, truth_id = _name(header, "clip_id", needed=False), _name(header, "truth_id", needed=False)
            record["clip"] = clip_id
            sizes = header.height, header.width, header.encoding, header.frame_height, header.frame_width
            with self.store.room() as (take, put):
                writer = ClipWriter(*sizes, self.limits, take)
                counts = self._receive(requests, writer)
                if not writer.empty:
                    clip_id = record["clip"] = put(writer.close(clip_id)).clip_id
            try:
                clip = self.store.get(clip_id)
            except ClipNotHeld:
                return pb.PutClipReply(clip_id=clip_id)
            if counts:
                self.store.add_truth(clip, truth_id, counts)
            return pb.PutClipReply(clip_id=clip_id, clip_held=True, truth_held=truth_id in clip.truths)

    def Track(self, request, context):
        with self._call(context, "Track", request):
            clip = self.store.get(_name(request, "clip_id"))
            prompts, ids = self._prompts(request.prompts, clip)
            frames = self._frames(request, clip)
            for found in self.engine.track(clip, prompts, frames or None, context.is_active):
                yield _reply(ids, *found)

    def Score(self, request, context):
        with self._call(context, "Score", request):
            clip = self.store.get(_name(request, "clip_id"))
            prompts, ids = self._prompts(request.prompts, clip)
            frames = self._frames(request, clip) or list(range(clip.frames))
            truth = clip.truth(_name(request, "truth_id"))
            column = {frame: n for n, frame in enumerate(frames)}
            j, f = np.full((2, len(prompts), len(frames)), np.nan)
            for which, at, masks in self.engine.track(clip, prompts, frames, context.is_active):
                true_masks = decode_masks([truth[frame] for frame in at], clip.height, clip.width)
                columns = [column[frame] for frame in at]
                j[which, columns] = region_similarity(masks, true_masks)
                if not request.skip_contour:
                    f[which, columns] = contour_accuracy(masks, true_masks)
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
            model=self.description.model,
            versions=self.description.versions,
            device=str(self.engine.model.device),
            image_size=self.engine.image_size,
            max_frames=self.limits.max_frames,
            max_pixels=self.limits.max_pixels,
            max_prompts=self.limits.max_prompts,
            clips_held=len(self.store),
            max_masks=self.limits.max_masks,
            max_calls=self.limits.max_calls,
            max_clips=self.limits.max_clips,
            max_clip_bytes=self.limits.clip_bytes,
            max_message_bytes=MESSAGE_BYTES,
        )

    def drain(self, seconds: float) -> bool:
        """Refuses new calls and waits for those under way. False when some were still running after `seconds`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self.calls == 0, seconds)

    def refused(self, method: str) -> None:
        """A call that came without the token."""
        name = method.rpartition("/")[2]
        known = name in pb.DESCRIPTOR.services_by_name["Tracker"].methods_by_name  # or strangers could name our metrics
        self._tell(CallRecord(name if known else "unknown", grpc.StatusCode.UNAUTHENTICATED.name, 0.0))

    @contextmanager
    def _call(self, context, method: str, request=None) -> Iterator[dict[str, str]]:
        """Counts and records the call, and turns what goes wrong in it into a status.

        Yields what may still be added to its record.
        """
        began, peer, record = time.monotonic(), context.peer(), {"clip": getattr(request, "clip_id", "")[:64]}
        code, message = grpc.StatusCode.CANCELLED, ""  # unless it comes to an end
        admitted = False
        try:
            admitted = self._admit(peer)
            if request is not None:
                self._check_model(_name(request, "model", needed=False))
            yield record
            code = grpc.StatusCode.OK
        except grpc.RpcError:  # the caller went away while its frames were read
            raise
        except Exception as error:
            kind = next((kind for kind in _CODES if isinstance(error, kind)), None)
            code = _CODES.get(kind, grpc.StatusCode.INTERNAL)
            expected = kind not in (None, MemoryError, OSError)
            message = (str(error) or kind.__doc__) if expected else f"{type(error).__name__}: {error}"
            if kind is None:
                LOGGER.exception("failed")
            if kind is Full:
                context.set_trailing_metadata(((RETRY_KEY, str(RETRY_MILLISECONDS)),))
            context.abort(code, message)
        finally:
            if admitted:
                with self._changed:
                    self._callers -= Counter([peer])
                    self._changed.notify_all()
            prompts = len(request.prompts) if request is not None else 0
            seconds = time.monotonic() - began
            self._tell(CallRecord(method, code.name, seconds, peer, record["clip"], prompts, message))

    def _admit(self, peer: str) -> bool:
        with self._changed:
            if self._draining:
                raise _Draining
            if self.calls >= self.limits.max_calls or self._callers[peer] >= self.limits.max_calls_together:
                raise Full
            self._callers[peer] += 1
        return True

    def _check_model(self, meant: str) -> None:
        runs = self.description.model
        if meant and meant != runs:
            raise _OtherModel(f"model {runs[:12]} of {self.description.checkpoint} runs here, {meant[:12]} is meant")

    def _tell(self, record: CallRecord) -> None:
        for watcher in self.watchers:
            watcher(record)

    def _receive(self, requests, writer: ClipWriter) -> list[bytes]:
        """Gives the frames that follow a header to the writer; returns the truth's masks."""
        counts, size = [], 0
        for request in requests:
            part = request.WhichOneof("part")
            if part == "piece":
                writer.add(request.piece.data, request.piece.last)
            elif part == "truth":
                counts.extend(request.truth.counts)
                size += sum(map(len, request.truth.counts))
                if len(counts) > self.limits.max_frames or size > self.limits.truth_bytes:
                    most = f"{self.limits.max_frames} masks or {self.limits.truth_bytes} bytes"
                    raise InputError(f"truth: more than {most}")
            else:
                raise InputError("part: frames or truth must follow the header")
        return counts

    def _prompts(self, requested: Sequence[pb.Prompt], clip: Clip) -> tuple[list[Prompt], list[list[int]]]:
        """The different prompts, and the ids each of them answers for."""
        if not 1 <= len(requested) <= self.limits.max_prompts:
            raise InputError(f"prompts: {len(requested)} of them, not between 1 and {self.limits.max_prompts}")
        ids: dict[Prompt, list[int]] = {}
        for prompt in requested:
            box = (prompt.x1, prompt.y1, prompt.x2, prompt.y2)
            if not 0 <= prompt.keyframe < clip.frames:
                raise InputError(f"keyframe: {prompt.keyframe} in a clip of {clip.frames} frames")
            if not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
                raise InputError(f"box: {box} is empty or not finite")
            if box[2] <= 0 or box[3] <= 0 or box[0] >= clip.width or box[1] >= clip.height:
                raise InputError(f"box: {box} lies outside the frame of {clip.width} x {clip.height} pixels")
            if max(map(abs, box)) > FARTHEST:
                raise InputError(f"box: {box} reaches farther than {FARTHEST} pixels")
            ids.setdefault((prompt.keyframe, box), []).append(prompt.prompt_id)
        return list(ids), list(ids.values())

    def _frames(self, request: pb.TrackRequest | pb.ScoreRequest, clip: Clip) -> list[int]:
        """The frames asked for; none means all."""
        requested = request.frames
        if len(set(requested)) != len(requested) or max(requested, default=0) >= clip.frames:
            raise InputError(f"frames: must be different and below {clip.frames}")
        masks = len(request.prompts) * (len(requested) or clip.frames)
        if masks > self.limits.max_masks:
            raise InputError(f"prompts: {masks} masks asked for, {self.limits.max_masks} at most in a call")
        return list(requested)


def _name(message, field: str, needed: bool = True) -> str:
    """The clip_id, truth_id or model of a message."""
    name = getattr(message, field)
    if (name or needed) and not re.fullmatch("[0-9a-f]{64}", name):
        raise InputError(f"{field}: not a SHA-256 in hexadecimal")
    return name


def _reply(ids: list[list[int]], which: list[int], at: list[int], masks: np.ndarray) -> pb.TrackReply:
    found = zip(which, at, encode_masks(masks), strict=True)
    return pb.TrackReply(masks=[pb.Mask(prompt_ids=ids[p], frame=t, counts=c) for p, t, c in found])
