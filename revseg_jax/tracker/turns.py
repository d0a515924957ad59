"""Who may use the model next. No torch here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURNS_BEFORE_OTHERS = 512  # a call that had so many arrives anew, behind those that wait by then


class Turns:
    """One call at a time, a step at a time: of those that wait, the one that came first.

    First come, first served keeps few clips at work, so that their features stay in the cache; a call that does not ask
    for its next turn (its caller is slow to take the masks, say) keeps nobody waiting, and very long ones step back
    again and again, behind those that have come meanwhile and before those that come later.
    """

    def __init__(self):
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._taken = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def arrive(self) -> Call:
        return Call(self)


class Call:
    """What takes its turns in order of arrival. For one thread at a time."""

    def __init__(self, turns: Turns):
        self._turns, self._arrival, self._left = turns, next(turns._arrivals), TURNS_BEFORE_OTHERS

    @contextmanager
    def turn(self) -> Iterator[None]:
        turns = self._turns
        if not self._left:
            self._arrival, self._left = next(turns._arrivals), TURNS_BEFORE_OTHERS
        self._left -= 1
        with turns._changed:
            turns._waiting.add(self._arrival)
            try:
                turns._changed.wait_for(lambda: not turns._taken and min(turns._waiting) == self._arrival)
                turns._taken = True
            finally:
                turns._waiting.remove(self._arrival)
        try:
            yield
        finally:
            with turns._changed:
                turns._taken = False
                turns._changed.notify_all()
