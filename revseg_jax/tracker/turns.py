"""Who may use the model next. No torch here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURNS_BEFORE_OTHERS = 512  # a call that had so many lets those that had fewer go first


class Turns:
    """One call at a time, a step at a time: of those that wait, the one that came first.

    First come, first served keeps few clips at work, so that their features stay in the cache; a call that does not ask
    for its next turn (its caller is slow to take the masks, say) keeps nobody waiting, and very long ones step back.
    """

    def __init__(self):
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._waiting: set[tuple[int, int]] = set()
        self._taken = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def arrive(self) -> Call:
        return Call(self, next(self._arrivals))


class Call:
    """What takes its turns in order of arrival. For one thread at a time."""

    def __init__(self, turns: Turns, arrival: int):
        self._turns, self._arrival, self._had = turns, arrival, 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        turns, rank = self._turns, (self._had // TURNS_BEFORE_OTHERS, self._arrival)
        with turns._changed:
            turns._waiting.add(rank)
            try:
                turns._changed.wait_for(lambda: not turns._taken and min(turns._waiting) == rank)
                turns._taken = True
            finally:
                turns._waiting.remove(rank)
        self._had += 1
        try:
            yield
        finally:
            with turns._changed:
                turns._taken = False
                turns._changed.notify_all()
