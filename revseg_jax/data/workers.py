"""Examples made in worker processes. Nothing here may import jax or torch: workers stay small and start quickly."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from multiprocessing.connection import Connection

from revseg_jax.config import ChainConfig
from revseg_jax.data.example import Example, make_example
from revseg_jax.data.processes import WorkerContext
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import RunFailure


class ExampleWorkers:
    """`workers(pair, index)` is the Example of a pair of the source, made in one of `count` processes. Threads may call
    it at the same time. The processes start with the first call and end when this object or its process does.

    Each has a pipe of its own, which closes when it is killed. (The pipe that a ProcessPoolExecutor shares stays open:
    killed in the middle of an answer, a worker would be waited for without an end.)
    """

    def __init__(self, source: ClipSource, chain: ChainConfig, count: int):
        self._source, self._chain, self._count = source, chain, count
        self._idle: queue.SimpleQueue[Connection] | None = None
        self._lock = threading.Lock()

    def __call__(self, pair: int, index: int) -> Example:
        """Raises RunFailure when a process was killed, and whatever reading the clip raises."""
        with self._lock:
            if self._idle is None:
                self._idle = self._started()
        worker = self._idle.get()
        try:
            worker.send((pair, index))
            answer = worker.recv()
        except (EOFError, OSError):
            raise RunFailure(
                f"one of the {self._count} processes that read clips was killed: does data.workers={self._count} fit "
                "into memory?"
            ) from None
        finally:
            self._idle.put(worker)  # a killed one too: whoever gets it next fails as well, instead of waiting
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _started(self) -> queue.SimpleQueue[Connection]:
        spawn, idle = WorkerContext(), queue.SimpleQueue()
        for _ in range(self._count):
            ours, theirs = spawn.Pipe()
            spawn.Process(target=_serve, args=(theirs, self._source, self._chain), daemon=True).start()
            theirs.close()
            idle.put(ours)
        return idle


def _serve(trainer: Connection, source: ClipSource, chain: ChainConfig) -> None:
    """Answers requests until the trainer's end of the pipe is closed."""
    os.setpgrp()  # Ctrl-C and signals to the group are the trainer's to answer; when it ends, its workers do
    while True:
        try:
            answer = _made(source, chain, *trainer.recv())
            trainer.send(answer)
        except (EOFError, OSError):
            return


def _made(source: ClipSource, chain: ChainConfig, pair: int, index: int) -> Example | Exception:
    try:
        return make_example(source[pair], index, chain)
    except Exception as error:  # the trainer's to raise
        error.add_note(traceback.format_exc())
        return error
