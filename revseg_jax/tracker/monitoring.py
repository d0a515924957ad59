"""What a sidecar tells its operators: one JSON line a call on stderr, and Prometheus metrics where they are asked for.

No torch here; prometheus_client is only imported by `serve_metrics`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker.security import ServerTLS

LOGGER = logging.getLogger("revseg.sidecar")
REQUEST_SECONDS = 10.0  # that one for the metrics may take
BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


@dataclass(frozen=True)
class CallRecord:
    """One call that has ended. seconds: from when the service got it, waiting included."""

    method: str
    code: str  # of the gRPC status
    seconds: float
    peer: str = ""
    clip: str = ""  # its id
    prompts: int = 0
    message: str = ""  # of an error


def log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    LOGGER.handlers, LOGGER.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)


def log_call(record: CallRecord) -> None:
    known = {name: value for name, value in vars(record).items() if value not in ("", 0)}
    # A refused call is the caller's affair; it is the sidecar's own failures that somebody should look at.
    level = logging.ERROR if record.code in ("INTERNAL", "UNKNOWN") else logging.INFO
    LOGGER.log(level, "call", extra={"fields": {**known, "seconds": round(record.seconds, 4)}})


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_failed_request(_: object, peer: tuple) -> None:
    """One line where the standard server prints a traceback: whoever only looks whether the port is open causes it."""
    LOGGER.info("metrics", extra={"fields": {"peer": peer[0], "message": repr(sys.exception())}})


def serve_metrics(
    host: str, port: int, tls: ServerTLS | None, gauges: Mapping[str, tuple[str, Callable[[], float]]]
) -> tuple[int, Callable[[CallRecord], None]]:
    """Serves /metrics over HTTP (HTTPS with `tls`): the port taken, and what to call with each record.

    gauges: name -> (help, read at each scrape); those ending in _total are counters.
    """
    try:
        from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:
        raise InputError("--metrics-port needs prometheus_client: pip install 'revseg-jax[sidecar]'") from None

    class Gauges:
        def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
            for name, (help_text, read) in gauges.items():
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                yield kind(f"revseg_sidecar_{name}", help_text, value=read())

    registry = CollectorRegistry()
    registry.register(Gauges())
    ProcessCollector(registry=registry)  # memory, processor time and open files of this process, where /proc is
    seconds = Histogram(
        "revseg_sidecar_call_seconds", "Time of a call", ["method", "code"], registry=registry, buckets=BUCKETS
    )
    files = {}
    if tls is not None:
        files = {"certfile": str(tls.certificate), "keyfile": str(tls.key)}
        if tls.client_ca is not None:
            files |= {"client_cafile": str(tls.client_ca), "client_auth_required": True}
    try:
        server, _ = start_http_server(port, host, registry, **files)
    except (OSError, OverflowError) as error:
        raise RunFailure(f"the sidecar cannot serve metrics on {host}:{port}: {error}") from None
    # Handshakes belong to the requests' threads, and end: one that stands still would keep all others from connecting.
    server.RequestHandlerClass = type("Handler", (server.RequestHandlerClass,), {"timeout": REQUEST_SECONDS})
    server.handle_error = _log_failed_request
    if tls is not None:
        server.socket.do_handshake_on_connect = False
    return server.server_port, lambda record: seconds.labels(record.method, record.code).observe(record.seconds)
