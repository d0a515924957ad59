"""Connections to sidecars: which one to ask, what it holds, and what to do when it does not answer. No torch here."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import tracker_pb2_grpc
from revseg_jax.tracker.security import TLS, channel
from revseg_jax.tracker.upload import Upload
from revseg_jax.tracker.wire import REPLY_BYTES, RETRY_KEY

Answer = TypeVar("Answer")

FIRST_CONTACT_SECONDS = 10.0  # how long a sidecar that never answered is waited for
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0  # between attempts
LEFT_OUT_SECONDS = 5.0  # how long a sidecar that went away is passed over while there are others
ASK_FIRST_BYTES = 64 << 10  # larger clips are sent only after the sidecar said that it does not hold them
REMEMBERED_CLIPS = 10_000
REFUSALS = (  # what another sidecar would say as well
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for the web
    ("grpc.max_receive_message_length", REPLY_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # what a connection may take, handshakes and a far network included
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 20_000),  # notices a host that vanished during a call without a deadline
    ("grpc.keepalive_timeout_ms", 10_000),
]


class SidecarAway(RunFailure):
    """No sidecar answered, or none had room, for as long as the client is patient; or two in a row, or the only one,
    failed at the call; or one runs another model than the first that answered, and is as good as away."""


def check(host: str, port: int, seconds: float = 5.0, tls: TLS | None = None) -> bool:
    """Whether a sidecar serves there, by the standard health service, which asks for no token."""
    with channel(_target(host, port), tls, None, CHANNEL_OPTIONS) as opened:
        try:
            reply = health_pb2_grpc.HealthStub(opened).Check(
                health_pb2.HealthCheckRequest(), timeout=seconds, wait_for_ready=False
            )
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING


class Endpoint:
    """One sidecar, and which clips it was last known to hold."""

    def __init__(self, address: str, tls: TLS | None = None, token: str | None = None):
        self.address = address
        self.channel = channel(address, tls, token, CHANNEL_OPTIONS)
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
    def __init__(self, addresses: Sequence[str], patience_seconds: float, tls: TLS | None, token: str | None):
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise InputError(f"tracker endpoint {address!r} is not of the form host:port")
        if not addresses:
            raise InputError("no tracker endpoint given; expected host:port")
        self.endpoints = [Endpoint(address, tls, token) for address in addresses]
        self.patience_seconds = patience_seconds
        self._homes: OrderedDict[str, int] = OrderedDict()  # where a clip went, the longest unasked-for first
        self._turn = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def call(self, ask: Callable[[Endpoint], Answer], upload: Upload | None = None) -> Answer:
        """Asks the clip's endpoint, the others when it is away, and again until patience is over (SidecarAway). That is
        counted from the first refusal: a clip may have been on its way, or a call running, for long before.

        When one fails at the call (it is out of memory, or too slow for the deadline), another is asked, once.
        """
        refused, pause, evictions, elsewhere = 0.0, FIRST_PAUSE_SECONDS, 0, len(self.endpoints) > 1
        failed: set[Endpoint] = set()  # since all were tried last
        full: set[Endpoint] = set()  # have been so at this call
        while True:
            endpoint = self._choose(upload.header.clip_id if upload else "", failed)
            try:
                answer = ask(endpoint)
                endpoint.answered, endpoint.left_out_until = True, 0.0
                return answer
            except grpc.RpcError as error:
                code, hint = error.code(), retry_hint(error)
                if code == grpc.StatusCode.NOT_FOUND and upload is not None and evictions < 3:
                    endpoint.forget(upload)
                    evictions += 1
                    continue
                gone = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
                final = not gone and hint is None and (code in REFUSALS or not elsewhere)
                if final or self._closed.is_set():
                    raise _failure(endpoint, error) from None
                last = error
            if hint is None:  # away, or it failed at this call: others are asked first
                failed = (failed | {endpoint}) if len(failed) + 1 < len(self.endpoints) else set()
                endpoint.left_out_until = time.monotonic() + LEFT_OUT_SECONDS
            if gone:
                endpoint.forget()
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE_SECONDS)
            elif hint is None:
                elsewhere = False
                continue
            else:  # it is there, but full: the hint says when to come back, and not all clients together
                endpoint.answered = True
                wait = hint * random.uniform(0.5, 1.5)
                if endpoint in full:  # the clip's own one, which may hold its features, is asked twice
                    now = time.monotonic()
                    endpoint.left_out_until = now + wait
                    others = (other.left_out_until for other in self.endpoints if other not in failed)
                    wait = max(0.0, min(others) - now)
                full.add(endpoint)
            known = any(other.answered for other in self.endpoints)
            patience = self.patience_seconds if known else min(FIRST_CONTACT_SECONDS, self.patience_seconds)
            refused = refused or time.monotonic()
            if time.monotonic() - refused + wait > patience:
                raise SidecarAway(self._nobody(time.monotonic() - refused, endpoint, last))
            self._closed.wait(wait)

    def close(self) -> None:
        self._closed.set()
        for endpoint in self.endpoints:
            endpoint.channel.close()

    def _choose(self, clip_id: str, failed: set[Endpoint]) -> Endpoint:
        """The clip's own one, or the next of those that are not away."""
        first = self._home(clip_id)
        ordered = self.endpoints[first:] + self.endpoints[:first]
        now = time.monotonic()
        left_out = lambda endpoint: endpoint.left_out_until if endpoint.left_out_until > now else 0.0  # noqa: E731
        return min(ordered, key=lambda endpoint: (endpoint in failed, left_out(endpoint)))

    def _home(self, clip_id: str) -> int:
        """Round robin; but a clip that came before goes where its features are."""
        with self._lock:
            home = self._homes.pop(clip_id, None)
            if home is None:
                home, self._turn = self._turn, (self._turn + 1) % len(self.endpoints)
            if clip_id:
                self._homes[clip_id] = home
            if len(self._homes) > REMEMBERED_CLIPS:
                self._homes.popitem(last=False)
            return home

    def _nobody(self, seconds: float, endpoint: Endpoint, last: grpc.RpcError) -> str:
        addresses = ", ".join(endpoint.address for endpoint in self.endpoints)
        if retry_hint(last) is not None:
            return f"the tracker sidecar at {endpoint.address} has been full for {seconds:.0f} s; start more of them"
        port = self.endpoints[0].address.rpartition(":")[2]
        advice = f"start one there with `revseg sidecar --port {port}`"
        if "handshake" in details(last).lower():
            advice = f"the TLS handshake with {endpoint.address} failed: check certificates and the authority given"
        return f"no tracker sidecar answers at {addresses} (waited {seconds:.0f} s); {advice}"


def retry_hint(error: grpc.RpcError) -> float | None:
    """After how many seconds a full sidecar wants to be asked again; None when it said nothing of the kind."""
    if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
        return None
    hints = [value for key, value in error.trailing_metadata() or () if key == RETRY_KEY]
    return int(hints[0]) / 1000 if hints and hints[0].isdigit() else None


def _failure(endpoint: Endpoint, error: grpc.RpcError) -> InputError | SidecarAway:
    """What a call that is not tried again means to the caller."""
    where = f"tracker sidecar at {endpoint.address}"
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InputError(f"tracker: {details(error)}")
        case grpc.StatusCode.UNAUTHENTICATED:
            return InputError(f"{where} refuses the call: {details(error)} (tracker.token_file, --token-file)")
        case grpc.StatusCode.FAILED_PRECONDITION:
            return SidecarAway(f"{where} runs another model than the first that answered: {details(error)}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return SidecarAway(
                f"{where} did not answer in time; is it overloaded, or tracker.deadline_seconds too short?"
            )
        case _:
            return SidecarAway(f"{where} failed: {details(error)}")


def details(error: grpc.RpcError) -> str:
    lines = (error.details() or "").splitlines() or [""]
    explained = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    return lines[0] if explained else f"{error.code().name} {lines[0]}".strip()


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
