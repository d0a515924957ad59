"""Stopping between two phases of a step when the machine is about to be taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(BaseException):
    """SIGTERM has come while `Interruption.at_once` was in force. Not an Exception, so that nothing swallows it."""


@dataclass
class Interruption:
    """Attributes:
    requested: SIGTERM has come; set from a signal handler, read between phases
    raises: the handler also raises Interrupted
    """

    requested: bool = False
    raises: bool = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The block is left by Interrupted as soon as SIGTERM comes: for long work whose loss costs nothing."""
        self.raises = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self.raises = False


@contextmanager
def heed_sigterm() -> Iterator[Interruption]:
    """While the block runs SIGTERM only sets `requested`. Outside the main thread nothing is changed."""
    interruption = Interruption()

    def request(number, frame):
        interruption.requested = True
        if interruption.raises:
            raise Interrupted

    try:
        before = signal.signal(signal.SIGTERM, request)
    except ValueError:  # not the main thread: signals are not this caller's to handle
        yield interruption
        return
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGTERM, before)
