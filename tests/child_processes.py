"""Real processes that the tests start: two of one run, and waiting for what one does."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def report(found: Any) -> None:
    """Hand the result of a process of `run_two` over: in a file, as Gloo's threads write to the output at any time."""
    Path(os.environ["REVSEG_TEST_REPORT"]).write_text(json.dumps(found))


def run_two(code: str, *arguments: str) -> list[tuple[Any, str, int]]:
    """Two processes over loopback with four virtual devices each.

    Returns what they gave to `report` (None: nothing), error output and exit status of `python -c code INDEX
    *arguments`, for INDEX 0 and 1. The tests' own modules can be imported there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment |= {"REVSEG_COORDINATOR": address, "REVSEG_PROCESS_COUNT": "2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / str(index) for index in range(2)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(index), *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment | {"REVSEG_PROCESS_ID": str(index), "REVSEG_TEST_REPORT": str(reports[index])},
            )
            for index in range(2)
        ]
        try:
            ended = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
        finally:
            for process in processes:
                process.kill()
        found = [json.loads(path.read_text()) if path.exists() else None for path in reports]
    return [(one, errors, status) for one, (errors, status) in zip(found, ended, strict=True)]


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: int) -> set[int]:
    try:
        return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except FileNotFoundError:
        return set()


def running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
