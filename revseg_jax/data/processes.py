"""Worker processes that never outlive the command."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes are spawned: array_record's threads do not survive a fork. They end when this process is killed, which
    the standard pool does not see to: left alone they would go on writing beside the next start."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: os._exit(bool(multiprocessing.connection.wait([parent]))), daemon=True).start()
