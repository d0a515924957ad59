"""Asks tracker sidecars for masks, or for scores of masks. A clip is sent once. No torch here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import tracker_pb2 as pb
from revseg_jax.tracker.connection import Connections, Endpoint, details
from revseg_jax.tracker.security import TLS
from revseg_jax.tracker.upload import ClipFrames, Truth, clip_upload, stream_upload
from revseg_jax.tracker.wire import decode_masks

Prompt = tuple[int, Sequence[float]]  # keyframe, box x1, y1, x2, y2 in pixels of the clip


@dataclass(frozen=True)
class Scores:
    """What the masks of P prompts are worth against the truth, over F frames. F is NaN where it was left out."""

    j: np.ndarray  # float64 [P], mean over the frames
    f: np.ndarray  # float64 [P]
    j_per_frame: np.ndarray  # float64 [P, F]
    f_per_frame: np.ndarray  # float64 [P, F]


class TrackerClient:
    """Connections to one or more sidecars. Safe to share between threads.

    Clips go to the sidecars in turn, and a clip that came before goes to the same one, which has its features; while
    that one is away, to the next. A sidecar that has answered before may be away for `patience_seconds` (it is being
    started again, say), or too busy to take a call, before the call fails with SidecarAway; one that never answered,
    for 10 s. `deadline_seconds` bounds each single request. What fails at one sidecar is tried once at another.

    All sidecars must run the model of the first that answers: masks and scores of two models are never mixed.

    All calls raise InputError when the input is refused and SidecarAway, a RunFailure, when no sidecar gives an answer,
    also for a sidecar with another model.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        deadline_seconds: float = 120.0,
        patience_seconds: float = 60.0,
        token: str | None = None,
        tls: TLS | None = None,
    ):
        """endpoints: "host:port" each. token: the sidecars' bearer token; it goes over TLS, or to this machine, only.

        tls: see `TLS`.
        """
        self._connections = Connections(endpoints, patience_seconds, tls, token)
        self._deadline = deadline_seconds
        self._pool = ThreadPoolExecutor(4 * self.sidecars, thread_name_prefix="score")
        self._first: pb.InfoReply | None = None
        self._lock = threading.Lock()

    @property
    def sidecars(self) -> int:
        """How many there are. Each is kept busy by a few calls at a time."""
        return len(self._connections.endpoints)

    def track(self, clip: ClipFrames, prompts: Sequence[Prompt], frames: Sequence[int] | None = None) -> np.ndarray:
        """Masks bool [prompts, T, H, W], or [prompts, len(frames), H, W] when only some frames are asked for.

        clip: uint8 [T, H, W, 3] or T JPEG images. prompts: (keyframe, (x1, y1, x2, y2) in pixels of the clip).
        """
        first = self._first_info()
        upload = clip_upload(clip, first.image_size)
        request = pb.TrackRequest(
            prompts=_prompts(prompts), frames=_frames(frames), clip_id=upload.header.clip_id, model=first.model
        )
        columns = {frame: n for n, frame in enumerate(range(upload.count) if frames is None else frames)}
        shape = (len(prompts), len(columns), upload.header.height, upload.header.width)
        if 0 in shape:
            return np.zeros(shape, bool)

        def ask(endpoint: Endpoint) -> np.ndarray:
            endpoint.put(upload, self._deadline)
            masks = np.zeros(shape, bool)
            for reply in endpoint.stub.Track(request, timeout=self._deadline):
                for mask in reply.masks:
                    masks[list(mask.prompt_ids), columns[mask.frame]] = decode_masks([mask.counts], *shape[2:])[0]
            return masks

        return self._connections.call(ask, upload)

    def track_stream(
        self, open_frames: Callable[[], Iterable[np.ndarray]], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """`track` for a long clip, of which neither side ever holds all frames in memory. The sidecar keeps it on disk
        and takes `max_frames` and `max_clip_bytes` of `info` at most, RGB at `upload.sent_size`.

        open_frames begins to read the clip anew each time it is called: uint8 [H, W, 3] frames of one size. Yields
        (index into prompts, frame, mask bool [H, W]) in the order of tracking: from the keyframe to the end, then from
        the keyframe to the start. Without a deadline. Raises RunFailure when the sidecar fails after its first mask.
        """
        first = self._first_info()
        upload = stream_upload(open_frames, first.image_size)
        request = pb.TrackRequest(prompts=_prompts(prompts), model=first.model)
        if not prompts:
            return

        def ask(endpoint: Endpoint) -> Iterator[pb.TrackReply]:
            request.clip_id = endpoint.put(upload, None)
            replies = endpoint.stub.Track(request)
            return itertools.chain([next(replies)], replies)  # errors before the first mask are worth another try

        try:
            for reply in self._connections.call(ask, upload):
                for mask in reply.masks:
                    found = decode_masks([mask.counts], upload.header.height, upload.header.width)[0]
                    for prompt in mask.prompt_ids:
                        yield prompt, mask.frame, found
        except grpc.RpcError as error:
            raise RunFailure(f"the tracker sidecar failed while it was tracking: {details(error)}") from None

    def score(
        self,
        clip: ClipFrames,
        prompts: Sequence[Prompt],
        truth: Truth,
        frames: Sequence[int] | None = None,
        contour: bool = True,
    ) -> Scores:
        """J and F of each prompt's masks against the truth, on all frames or on `frames` only.

        truth: bool [T, H, W], or T COCO RLEs with None where the object is absent. contour=False leaves out F, which
        takes about as long as the tracking with a small model.
        """
        first = self._first_info()
        upload = clip_upload(clip, first.image_size, truth)
        request = pb.ScoreRequest(
            clip_id=upload.header.clip_id,
            truth_id=upload.header.truth_id,
            prompts=_prompts(prompts),
            frames=_frames(frames),
            skip_contour=not contour,
            model=first.model,
        )
        shape = (len(prompts), upload.count if frames is None else len(frames))
        if 0 in shape:
            return Scores(*np.full((2, shape[0]), np.nan), *np.full((2, *shape), np.nan))

        def ask(endpoint: Endpoint) -> Scores:
            endpoint.put(upload, self._deadline)
            scores = sorted(endpoint.stub.Score(request, timeout=self._deadline).scores, key=lambda s: s.prompt_id)
            fields = ("j", "f", "j_per_frame", "f_per_frame")
            return Scores(*(np.array([getattr(score, name) for score in scores], np.float64) for name in fields))

        return self._connections.call(ask, upload)

    def score_async(self, *args, **kwargs) -> Future[Scores]:
        """`score` in the background; four calls a sidecar are under way at once."""
        return self._pool.submit(self.score, *args, **kwargs)

    def info(self) -> pb.InfoReply:
        """What a sidecar says about itself: model, device, limits, versions."""
        reply = self._connections.call(lambda endpoint: endpoint.stub.Info(pb.InfoRequest(), timeout=self._deadline))
        with self._lock:
            self._first = self._first or reply
        return reply

    def close(self) -> None:
        """Gives up what is under way."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._connections.close()

    def __enter__(self) -> TrackerClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _first_info(self) -> pb.InfoReply:
        if self._first is None:
            self.info()
        return self._first


def description(info: pb.InfoReply) -> dict[str, Any]:
    """What is written down about a tracker beside results that it had a part in. JSON-ready."""
    return {
        "tracker": {"model": info.model, "checkpoint": info.checkpoint, "config": info.config},
        "tracker_device": info.device,
        "tracker_versions": dict(info.versions),
    }


def _prompts(prompts: Sequence[Prompt]) -> list[pb.Prompt]:
    try:
        return [
            pb.Prompt(prompt_id=n, keyframe=int(keyframe), **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)))
            for n, (keyframe, box) in enumerate(prompts)
        ]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"a prompt must be (keyframe, (x1, y1, x2, y2)): {error}") from None


def _frames(frames: Sequence[int] | None) -> list[int] | None:
    if frames is not None and any(frame < 0 for frame in frames):
        raise InputError(f"frames must not be negative: {list(frames)}")
    return None if frames is None else list(frames)
