"""The sidecar process: a SAM2 model behind gRPC on one port. Started by `revseg sidecar`."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import revseg_jax
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import tracker_pb2, tracker_pb2_grpc
from revseg_jax.tracker.clips import Limits
from revseg_jax.tracker.guard import Guard
from revseg_jax.tracker.monitoring import LOGGER, log_as_json, serve_metrics
from revseg_jax.tracker.security import ServerTLS, refuse_exposure
from revseg_jax.tracker.wire import MESSAGE_BYTES

SERVICE = tracker_pb2.DESCRIPTOR.services_by_name["Tracker"].full_name
DRAIN_SECONDS = 60.0  # what calls under way get to finish after SIGTERM
SPARE_THREADS = 16  # beyond those of the calls that are taken: for health, info and refusals


def main(
    host: str = "127.0.0.1",
    port: int = 50051,
    checkpoint: str = "embedded",
    config: str = "embedded",
    device: str = "auto",
    threads: int | None = None,
    parent: int | None = None,
    tls: ServerTLS | None = None,
    token: str | None = None,
    insecure: bool = False,
    metrics_port: int | None = None,
    feature_mebibytes: int = 2048,
    host_feature_mebibytes: int | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT, then finishes the calls under way and returns 0.

    Prints one line, `sidecar serving on HOST:PORT`, when it is ready. port 0 takes any free one. device "auto" is cuda
    where there is one. threads: of torch on the CPU (None: torch's own choice). parent: a process id; when that process
    is gone, so is the sidecar. Without both tls and token only a loopback host is served, unless `insecure`.
    metrics_port: of Prometheus metrics over HTTP, or HTTPS with tls; they need no token. feature_mebibytes: of
    image features kept on the device; host_feature_mebibytes: of those that had to leave it (None: see `Engine`).

    Raises InputError for a checkpoint, config or limit that will not do or a host that would be open to others,
    RunFailure when a port cannot be had.
    """
    if not insecure:
        refuse_exposure(host, tls, token)
    for name, limit in (("feature", feature_mebibytes), ("host-feature", host_feature_mebibytes or 0)):
        if limit < 0:
            raise InputError(f"--{name}-mebibytes must not be negative, but is {limit}")
    signals = _signals()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    log_as_json()
    _try_port(host, port)
    service = _service(checkpoint, config, device, threads, feature_mebibytes, host_feature_mebibytes)
    if metrics_port is not None:
        metrics_port, watcher = serve_metrics(host, metrics_port, tls, _gauges(service))
        service.watchers.append(watcher)
    gc.collect()
    gc.freeze()  # torch's many objects stay; without them in the way, Python frees the calls that have ended at once
    server, health_service, port_taken = serve(service, host, port, tls, token)
    facts = {"host": host, "port": port_taken, "metrics_port": metrics_port, "checkpoint": str(checkpoint)}
    LOGGER.info("serving", extra={"fields": facts})
    print(f"sidecar serving on {host}:{port_taken}", flush=True)
    number = signals.recv(1)[0]
    LOGGER.info("draining", extra={"fields": {"signal": signal.Signals(number).name, "calls": service.calls}})
    health_service.enter_graceful_shutdown()  # from now on NOT_SERVING
    finished = service.drain(DRAIN_SECONDS)
    server.stop(grace=1.0).wait()  # lets the last answers out
    LOGGER.info("stopped", extra={"fields": {"finished": finished}})
    return 0


def serve(
    service: tracker_pb2_grpc.TrackerServicer,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ServerTLS | None = None,
    token: str | None = None,
) -> tuple[grpc.Server, health.HealthServicer, int]:
    """A started gRPC server with health service and reflection, and the port it took. Raises RunFailure."""
    options = [
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on it
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),  # finds clients whose machine vanished
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # clients ping while they wait for a long clip
    ]
    # Calls that wait for the model hold a thread each; the service says how many may.
    pool = ThreadPoolExecutor(service.limits.max_calls + SPARE_THREADS, thread_name_prefix="call")
    server = grpc.server(pool, interceptors=[Guard(token, service.refused)], options=options)
    tracker_pb2_grpc.add_TrackerServicer_to_server(service, server)
    health_service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise _cannot_listen(host, port, error) from None
    server.start()
    for name in ("", SERVICE):
        health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, health_service, port


def _service(
    checkpoint: str, config: str, device: str, threads: int | None, feature_mebibytes: int, host_mebibytes: int | None
) -> tracker_pb2_grpc.TrackerServicer:
    # Torch takes seconds to load: not before it is known that there is a port to serve on.
    import torch

    from revseg_jax.tracker.engine import Engine
    from revseg_jax.tracker.model import build_tracker, fingerprint
    from revseg_jax.tracker.service import Description, TrackerService

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device this machine lacks
        raise InputError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    versions = {"revseg_jax": revseg_jax.__version__, "sam2": version("sam2"), "torch": torch.__version__}
    model = build_tracker(config, checkpoint, device)
    description = Description(str(checkpoint), str(config), fingerprint(model, config, checkpoint), versions)
    host_bytes = None if host_mebibytes is None else host_mebibytes << 20
    engine = Engine(model, feature_mebibytes << 20, host_bytes, compiled=model.device.type == "cuda")
    if engine.compiled:
        reason = engine.warm_up()
        if reason:
            LOGGER.warning("not compiled", extra={"fields": {"reason": reason}})
    return TrackerService(engine, description, Limits())


def _signals() -> socket.socket:
    """Where the number of each SIGTERM and SIGINT can be read from, one byte each.

    Handlers written in Python wait for the main thread to wake up, and when the system delivers a signal to one of the
    other threads nothing wakes it; what is written here by the interpreter's own handler does.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: None)
    return reading


def _gauges(service) -> dict[str, tuple[str, Callable[[], float]]]:
    """What is worth watching, by metric name."""
    import torch

    engine, gauges = service.engine, {}
    gauges["calls"] = ("Calls under way", lambda: service.calls)
    gauges["calls_waiting"] = ("Calls that wait for the model", lambda: len(engine.turns))
    gauges["clips_held"] = ("Clips in the store", lambda: len(service.store))
    gauges["feature_bytes"] = ("Image features on the model's device", lambda: engine.features.device_bytes)
    gauges["host_feature_bytes"] = ("Image features that had to leave it", lambda: engine.features.host_bytes)
    gauges["feature_hits_total"] = ("Frames whose features were in the cache", lambda: engine.hits)
    gauges["feature_misses_total"] = ("Frames whose features were computed", lambda: engine.misses)
    if engine.model.device.type == "cuda":
        gauges["gpu_bytes"] = ("Memory in tensors", lambda: torch.cuda.memory_allocated(engine.model.device))
        gauges["gpu_peak_bytes"] = ("The most so far", lambda: torch.cuda.max_memory_allocated(engine.model.device))
    return gauges


def _try_port(host: str, port: int) -> None:
    """Raises RunFailure when the port cannot be had, before the model is loaded and gRPC prints lines of its own."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: Exception) -> RunFailure:
    return RunFailure(f"the sidecar cannot listen on {host}:{port} (--port 0 takes a free one): {error}")


def _follow(parent: int) -> None:
    """Ends this process when its parent is gone: whoever was to stop it no longer can."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
