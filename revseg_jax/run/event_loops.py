"""Reading checkpoints leaves nothing behind: Orbax closes its event loop at the first array that cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class WaitingLoop(asyncio.SelectorEventLoop):
    """Ends its tasks before it closes. Reads that are still under way would find a closed loop, and each of them would
    write a traceback at some later time."""

    def close(self) -> None:
        pending = set() if self.is_closed() else asyncio.all_tasks(self)
        if pending:
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


class WaitingLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> WaitingLoop:
        return WaitingLoop()


@contextmanager
def waiting_event_loops() -> Iterator[None]:
    """Event loops that libraries make while the block runs are `WaitingLoop`s."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(WaitingLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
