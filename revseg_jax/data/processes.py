"""Worker processes that never outlive the command, and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess


class WorkerProcess(SpawnProcess):
    """Never sees Ctrl-C, which a terminal sends to every process of a command: its parent answers. Met at an import it
    would end in a traceback, and met while the process holds the lock of a queue it would leave the others waiting."""

    def start(self) -> None:
        resource_tracker.ensure_running()  # its start opens the mask, and would otherwise come with the first process's
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process is born with its parent's
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerContext(SpawnContext):
    """Of `multiprocessing`. Processes are spawned: array_record's threads do not survive a fork."""

    Process = WorkerProcess


def cores() -> int:
    """Those that this process may use, of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Its processes end when this one is killed, which the standard pool does not see to: left alone they would go on
    writing beside the next start. They all start here, where no Ctrl-C can come between a process and its pool.

    At the end what has not begun is cancelled. The standard pool would do it first, and wait without an end for a task
    of which a Ctrl-C left only half in its books.
    """
    pool = ProcessPoolExecutor(workers, WorkerContext(), initializer=_end_with_parent)
    try:
        with _ctrl_c_waits():
            for _ in range(workers):
                pool.submit(int)  # as long as no process is idle, a task starts one
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: os._exit(bool(multiprocessing.connection.wait([parent]))), daemon=True).start()


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """For the block's end. Only the main thread ever hears of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
