"""Worker processes that never outlive the command."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def process_pool(workers: int, begin: Callable[..., None] | None = None, *arguments) -> ProcessPoolExecutor:
    """Processes are spawned: array_record's threads do not survive a fork. They end when this process is killed, which
    the standard pool does not see to: left alone they would go on writing beside the next start. Each calls
    `begin(*arguments)` first."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(begin, arguments))


def _begin(begin: Callable[..., None] | None, arguments: tuple) -> None:
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: os._exit(bool(multiprocessing.connection.wait([parent]))), daemon=True).start()
    if begin is not None:
        begin(*arguments)
