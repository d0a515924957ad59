"""The sidecar process: a SAM2 model behind gRPC on one port. Started by `revseg sidecar` or by tracker/process.py."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from queue import SimpleQueue

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import revseg_jax
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker import tracker_pb2, tracker_pb2_grpc
from revseg_jax.tracker.wire import MESSAGE_BYTES

SERVICE = tracker_pb2.DESCRIPTOR.services_by_name["Tracker"].full_name
DRAIN_SECONDS = 60.0  # what calls under way get to finish after SIGTERM
CALLS = 16  # served at once; more wait in the queue


def main(
    host: str = "127.0.0.1",
    port: int = 50051,
    checkpoint: str = "embedded",
    config: str = "embedded",
    device: str = "auto",
    threads: int | None = None,
    parent: int | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT, then finishes the calls under way and returns 0.

    Prints one line, `sidecar serving on HOST:PORT`, when it is ready. port 0 takes any free one. device "auto" is cuda
    where there is one. threads: of torch on the CPU (None: torch's own choice). parent: a process id; when that process
    is gone, so is the sidecar.

    Raises InputError for a checkpoint or config that does not load, RunFailure when the port cannot be had.
    """
    signals = SimpleQueue()  # the one queue that a signal handler may safely put into
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: signals.put(number))
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    server, port_taken = _bind(host, port)
    service = _service(checkpoint, config, device, threads)
    tracker_pb2_grpc.add_TrackerServicer_to_server(service, server)
    health_service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    server.start()
    for name in ("", SERVICE):
        health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    print(f"sidecar serving on {host}:{port_taken}", flush=True)
    signals.get()
    health_service.enter_graceful_shutdown()  # from now on NOT_SERVING
    service.drain(DRAIN_SECONDS)
    server.stop(grace=1.0).wait()  # lets the last answers out
    return 0


def _service(checkpoint: str, config: str, device: str, threads: int | None) -> tracker_pb2_grpc.TrackerServicer:
    # Torch takes seconds to load: not before it is known that there is a port to serve on.
    import torch

    from revseg_jax.tracker.clips import Limits
    from revseg_jax.tracker.engine import Engine
    from revseg_jax.tracker.model import build_tracker
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
    engine = Engine(build_tracker(config, checkpoint, device))
    return TrackerService(engine, Description(str(checkpoint), str(config), versions), Limits())


def _bind(host: str, port: int) -> tuple[grpc.Server, int]:
    options = [
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on it
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # clients ping while they wait for a long clip
    ]
    server = grpc.server(ThreadPoolExecutor(CALLS, thread_name_prefix="call"), options=options)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass  # gRPC would print lines of its own when it cannot have the port
        return server, server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except (OSError, OverflowError, RuntimeError) as error:
        raise RunFailure(f"the sidecar cannot listen on {host}:{port} (--port 0 takes a free one): {error}") from None


def _follow(parent: int) -> None:
    """Ends this process when its parent is gone: whoever was to stop it no longer can."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _command() -> int:
    parser = argparse.ArgumentParser(prog="python -m revseg_jax.tracker.sidecar", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parent", type=int)
    try:
        return main(**vars(parser.parse_args()))
    except (InputError, RunFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(_command())
