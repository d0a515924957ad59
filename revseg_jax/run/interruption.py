"""Signals that end a command, and stopping between two phases of a step when the machine is about to be taken away."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AGAIN_SECONDS = 1.0  # longer than a collection, in which other libraries' finalizers drop it unseen


SAVING = b"\nrevseg: saving when the current phase has ended; Ctrl-C again stops at once\n"


class Interrupted(BaseException):
    """What was to be heeded has come while `Interruption.at_once` was in force. Not an Exception, so that nothing
    swallows it."""


@contextmanager
def swallowed_signals_sent_again() -> Iterator[None]:
    """Python drops whatever a signal's handler raises inside a finalizer or a callback of the garbage collector, of
    which JAX has one: the command would go on as if nothing had come. While the block runs such a signal is sent
    again."""
    before = sys.unraisablehook

    def send_again(dropped) -> None:
        signals = {KeyboardInterrupt: signal.SIGINT, Interrupted: signal.SIGTERM}
        if dropped.exc_type not in signals:
            before(dropped)
            return
        timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signals[dropped.exc_type]))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """The block is left by Interrupted when SIGTERM comes, so that what is half written is taken away."""
    with heed_sigterm() as interruption, interruption.at_once():
        yield


@dataclass
class Interruption:
    """Attributes:
    requested: SIGTERM has come, or Ctrl-C; set from a signal handler, read between phases
    by_ctrl_c: it was Ctrl-C
    raises: the handler also raises Interrupted
    """

    requested: bool = False
    by_ctrl_c: bool = False
    raises: bool = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The block is left by Interrupted as soon as the signal comes: for long work whose loss costs nothing."""
        self.raises = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self.raises = False


@contextmanager
def heed_sigterm(ctrl_c: bool = False) -> Iterator[Interruption]:
    """While the block runs SIGTERM only sets `requested`; with ctrl_c the first Ctrl-C does so too, and says so, and
    the second is what it always is. Outside the main thread nothing is changed."""
    interruption = Interruption()
    before = {}

    def request(number, frame):
        interruption.requested = True
        if number == signal.SIGINT:
            interruption.by_ctrl_c = True
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            os.write(2, SAVING)  # print might be what the signal has come into
        if interruption.raises:
            raise Interrupted

    try:
        for number in (signal.SIGTERM, signal.SIGINT)[: 1 + ctrl_c]:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, request)
    except ValueError:  # not the main thread: signals are not this caller's to handle
        yield interruption
        return
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
