"""Connections to sidecars: which one to ask, what it holds, and what to do when it does not answer. No torch here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import tracker_pb2_grpc
from revseg_jax.tracker.upload import Upload
from revseg_jax.tracker.wire import REPLY_BYTES

Answer = TypeVar("Answer")

FIRST_CONTACT_SECONDS = 10.0  # how long a sidecar that never answered is waited for
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0  # between attempts
LEFT_OUT_SECONDS = 5.0  # how long a sidecar that went away is passed over while there are others
ASK_FIRST_BYTES = 64 << 10  # larger clips are sent only after the sidecar said that it does not hold them
REMEMBERED_CLIPS = 10_000
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for the web
    ("grpc.max_receive_message_length", REPLY_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 20_000),  # notices a host that vanished during a call without a deadline
    ("grpc.keepalive_timeout_ms", 10_000),
]


def check(host: str, port: int, seconds: float = 5.0) -> bool:
    """Whether a sidecar serves there, by the standard health service."""
    with grpc.insecure_channel(_target(host, port), options=CHANNEL_OPTIONS) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds, wait_for_ready=False
            )
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING


class Endpoint:
    """One sidecar, and which clips it was last known to hold."""

    def __init__(self, address: str):
        self.address = address
        self.channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = tracker_pb2_grpc.TrackerStub(self.channel)
        self.answered = False
        self.left_out_until = 0.0
        self._held: set[tuple[str, str]] = set()

    def put(self, upload: Upload, timeout: float | None) -> str:
        """Makes sure that the sidecar holds the clip and its truth. Returns the clip's id."""
        header = upload.header
        key = (header.clip_id, header.truth_id)
        if header.clip_id and key in self._held:
            return header.clip_id
        missing_clip = missing_truth = True
        if header.clip_id and upload.size > ASK_FIRST_BYTES:
            reply = self.stub.PutClip(iter(upload.messages(with_frames=False, with_truth=False)), timeout=timeout)
            missing_clip, missing_truth = not reply.clip_held, bool(header.truth_id) and not reply.truth_held
        clip_id = header.clip_id
        if missing_clip or missing_truth:
            try:
                clip_id = self.stub.PutClip(upload.messages(missing_clip, missing_truth), timeout=timeout).clip_id
            except grpc.RpcError:
                if upload.failures:
                    raise upload.failures.pop() from None
                raise
        if header.clip_id:
            if len(self._held) >= REMEMBERED_CLIPS:
                self._held.clear()
            self._held.add(key)
        return clip_id

    def forget(self, upload: Upload | None = None) -> None:
        """The clip, or everything, is not held there any more."""
        if upload is None:
            self._held.clear()
        else:
            self._held.discard((upload.header.clip_id, upload.header.truth_id))


class Connections:
    def __init__(self, addresses: Sequence[str], patience_seconds: float):
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise InputError(f"tracker endpoint {address!r} is not of the form host:port")
        if not addresses:
            raise InputError("no tracker endpoint given; expected host:port")
        self.endpoints = [Endpoint(address) for address in addresses]
        self.patience_seconds = patience_seconds
        self._closed = threading.Event()

    def call(self, ask: Callable[[Endpoint], Answer], upload: Upload | None = None) -> Answer:
        """Asks the clip's endpoint, the others when it is away, and again until patience is over."""
        began, pause, evictions = time.monotonic(), FIRST_PAUSE_SECONDS, 0
        while True:
            endpoint = self._choose(upload.header.clip_id if upload else "")
            try:
                answer = ask(endpoint)
                endpoint.answered, endpoint.left_out_until = True, 0.0
                return answer
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.INVALID_ARGUMENT:
                    raise InputError(f"tracker: {details(error)}") from None
                if code == grpc.StatusCode.NOT_FOUND and upload is not None and evictions < 3:
                    endpoint.forget(upload)
                    evictions += 1
                    continue
                if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise RunFailure(
                        f"tracker sidecar at {endpoint.address} did not answer in time; is it overloaded, or "
                        f"tracker.deadline_seconds too short?"
                    ) from None
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or self._closed.is_set():
                    raise RunFailure(f"tracker sidecar at {endpoint.address} failed: {details(error)}") from None
            endpoint.forget()
            endpoint.left_out_until = time.monotonic() + LEFT_OUT_SECONDS
            known = any(other.answered for other in self.endpoints)
            patience = self.patience_seconds if known else min(FIRST_CONTACT_SECONDS, self.patience_seconds)
            if time.monotonic() - began + pause > patience:
                raise RunFailure(self._nobody(time.monotonic() - began))
            self._closed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        self._closed.set()
        for endpoint in self.endpoints:
            endpoint.channel.close()

    def _choose(self, clip_id: str) -> Endpoint:
        """By the clip's content, so that all who ask about a clip ask the same sidecar; past those that are away."""
        first = int(clip_id[:8] or "0", 16) % len(self.endpoints)
        ordered = self.endpoints[first:] + self.endpoints[:first]
        now = time.monotonic()
        return min(ordered, key=lambda endpoint: endpoint.left_out_until if endpoint.left_out_until > now else 0.0)

    def _nobody(self, seconds: float) -> str:
        addresses = ", ".join(endpoint.address for endpoint in self.endpoints)
        port = self.endpoints[0].address.rpartition(":")[2]
        return (
            f"no tracker sidecar answers at {addresses} (waited {seconds:.0f} s); "
            f"start one there with `revseg sidecar --port {port}`"
        )


def details(error: grpc.RpcError) -> str:
    lines = (error.details() or "").splitlines() or [""]
    return f"{error.code().name} {lines[0]}".strip() if error.code() != grpc.StatusCode.INVALID_ARGUMENT else lines[0]


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
