"""Stopping between two phases of a step when the machine is about to be taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interruption:
    """Attributes:
    requested: SIGTERM has come; set from a signal handler, read between phases
    """

    requested: bool = False


@contextmanager
def heed_sigterm() -> Iterator[Interruption]:
    """While the block runs SIGTERM only sets `requested`. Outside the main thread nothing is changed."""
    interruption = Interruption()

    def request(number, frame):
        interruption.requested = True

    try:
        before = signal.signal(signal.SIGTERM, request)
    except ValueError:  # not the main thread: signals are not this caller's to handle
        yield interruption
        return
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGTERM, before)
