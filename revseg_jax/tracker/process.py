"""A client of the sidecars a config names; with none named, a sidecar is started on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from revseg_jax.config import TrackerConfig
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.tracker.client import TrackerClient
from revseg_jax.tracker.security import TLS, read_token

READY = "sidecar serving on "
STOP_SECONDS = 70.0  # a little more than the sidecar takes to drain


@contextmanager
def open_tracker(config: TrackerConfig, device: str = "auto") -> Iterator[TrackerClient]:
    """A client of the configured sidecars, or of one started here, on `device`, for as long as the block lasts."""
    started = run_sidecar(config.checkpoint, config.config, device, config.threads or None)
    with nullcontext() if config.endpoints else started as endpoint:
        token, tls = credentials(config) if config.endpoints else (None, None)
        endpoints = config.endpoints or [endpoint]
        with TrackerClient(endpoints, config.deadline_seconds, config.patience, token=token, tls=tls) as client:
            yield client


def credentials(config: TrackerConfig) -> tuple[str | None, TLS | None]:
    """The token and the TLS files for the configured sidecars. Raises InputError for files that cannot be used."""
    token = read_token(config.token_file) if config.token_file else None
    files = config.tls_ca or None, config.tls_certificate or None, config.tls_key or None
    return token, TLS(*files) if any(files) else None


@contextmanager
def run_sidecar(
    checkpoint: str = "embedded",
    config: str = "embedded",
    device: str = "auto",
    threads: int | None = None,
    port: int = 0,
    log: Path | None = None,
) -> Iterator[str]:
    """Yields the endpoint "127.0.0.1:port" of a sidecar that serves; it ends with the block, or with this process.

    port 0 takes any free one. log: where its stderr goes (None: an unnamed file).

    Raises InputError or RunFailure with the sidecar's own last line when it does not come up.
    """
    arguments = {"checkpoint": checkpoint, "config": config, "device": device, "port": port, "parent": os.getpid()}
    command = [sys.executable, "-m", "revseg_jax.cli", "sidecar"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    environment = dict(os.environ)
    if threads is not None:
        command.append(f"--threads={threads}")
        environment["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded, or its libraries start more
    with open(log, "w+b") if log else tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the caller, who ends the sidecar when done with it
        )
        try:
            line = process.stdout.readline()
            if not line.startswith(READY):
                raise _failure(process.wait(), stderr)
            yield line.removeprefix(READY).strip()
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _failure(code: int, stderr) -> InputError | RunFailure:
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1].removeprefix("revseg: error: ") if lines else f"exit code {code}"
    kind = InputError if code == 2 else RunFailure
    return kind(f"the tracker sidecar did not start: {reason}")
