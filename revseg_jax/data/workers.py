"""Examples made in worker processes. Nothing here may import jax or torch: workers stay small and start quickly."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from revseg_jax.config import ChainConfig
from revseg_jax.data.example import Example, make_example
from revseg_jax.data.processes import process_pool
from revseg_jax.data.source import ClipSource
from revseg_jax.errors import RunFailure


class ExampleWorkers:
    """`workers(pair, index)` is the Example of a pair of the source, made in one of `count` processes. Threads may call
    it at the same time. The processes start with the first call and end when this object or its process does."""

    def __init__(self, source: ClipSource, chain: ChainConfig, count: int):
        self._source, self._chain, self._count = source, chain, count
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, pair: int, index: int) -> Example:
        """Raises RunFailure when a process was killed, and whatever reading the clip raises."""
        with self._lock:
            if self._pool is None:
                self._pool = process_pool(self._count, _begin, self._source, self._chain)
        try:
            return self._pool.submit(_make, pair, index).result()
        except BrokenProcessPool:
            raise RunFailure(
                f"one of the {self._count} processes that read clips was killed: does data.workers={self._count} fit "
                "into memory?"
            ) from None


_of_this_process: tuple[ClipSource, ChainConfig] | None = None


def _begin(source: ClipSource, chain: ChainConfig) -> None:
    global _of_this_process
    _of_this_process = source, chain
    os.setpgrp()  # Ctrl-C and signals to the group are the trainer's to answer; when it ends, its workers do


def _make(pair: int, index: int) -> Example:
    source, chain = _of_this_process
    return make_example(source[pair], index, chain)
