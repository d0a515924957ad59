"""Several processes as one run: what they tell each other on the host, and how one that fails ends all of them."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the key-value store has no public name yet
from jax.experimental import multihost_utils

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.parallel.device_memory import explain_full_memory

Thing = TypeVar("Thing")

FAILED = "revseg/failed"  # key under which the first process that fails says why
ENDED = "revseg/ended"  # barrier
ENDING = threading.Lock()  # never let go of
LAST_SECONDS = 0.5  # by which process 0 leaves later: JAX aborts a process that finds it gone


def leads() -> bool:
    """Whether this is the process that writes logs and checks what must be checked once."""
    return jax.process_index() == 0


def first_gpu() -> str | None:
    """Of several processes on GPUs, the first that this one has, as torch calls it on this machine; else None."""
    # A process by itself may have no use for JAX: asked for its devices, JAX would take three quarters of a GPU.
    if _client() is None or jax.default_backend() != "gpu":
        return None
    return f"cuda:{jax.local_devices()[0].local_hardware_id}"


def gather(thing: Thing) -> list[Thing]:
    """What every process gave, in their order. All processes must call it; anything that pickles."""
    if jax.process_count() == 1:
        return [thing]
    data = np.frombuffer(pickle.dumps(thing), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, as each is a program of its own
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(thing: Thing) -> Thing:
    """The first process's that is neither None nor False, else this one's: the same decision in all of them."""
    return next((other for other in gather(thing) if other), thing)


@contextmanager
def failing_together() -> Iterator[None]:
    """While the block runs, an error in any of the processes ends all of them, with its message and exit status.

    A process that raises tells the others why. They may be inside a collective that will never end, so a thread of
    theirs prints the message and exits. One that is killed tells nothing: its peers find their connections closed, or
    the heartbeats missing, and end with that.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), daemon=True)
    watch.start()
    try:
        with telling_others():
            yield
    finally:
        done.set()
        watch.join()  # an interpreter that ends around a thread inside JAX's client would crash


@contextmanager
def telling_others() -> Iterator[None]:
    """An error in the block is told to the other processes and ends this one at once: what encloses the block may wait
    for them, as checkpoints do that are closed."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        said = str(error) if isinstance(error, InputError | RunFailure) else explain_full_memory(error)
        if said is None:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        first_line = (said.splitlines() or [type(error).__name__])[0]
        told = f"{2 if isinstance(error, InputError) else 1} process {jax.process_index()} failed: {first_line}"
        try:
            _client().key_value_set(FAILED, told)
        except jax.errors.JaxRuntimeError:
            # Another was first, or the coordinator is gone: this error may only be the echo of that one's.
            told = _reason(milliseconds=1000) or told
        _end(told)


def _client() -> Any:
    return distributed.global_state.client


def _watch(done: threading.Event) -> None:
    while not done.is_set():
        told = _reason(milliseconds=1000)
        if told and not done.is_set():
            _end(told)


def _reason(milliseconds: int) -> str | None:
    try:
        return _client().blocking_key_value_get(FAILED, milliseconds)
    except jax.errors.JaxRuntimeError:  # nobody has failed yet
        return None


def _end(told: str) -> None:
    """Leaves without the usual exit, in which JAX would wait for processes that are stuck."""
    ENDING.acquire()  # by the thread that failed or by the one that watches: the other must not cut it short
    status, _, reason = told.partition(" ")
    print(f"revseg: error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    try:
        # Process 0 holds the message: it stays until the others have read it.
        _client().wait_at_barrier(ENDED, 5000)
    except jax.errors.JaxRuntimeError:  # one of them was killed
        pass
    if leads():
        time.sleep(LAST_SECONDS)
    os._exit(int(status))
