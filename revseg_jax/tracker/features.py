"""Image features of the frames seen last: on the model's device, then in the host's memory, each within its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

Key = tuple[str, int]  # clip id, frame
Levels = list[Tensor]  # feature maps of one frame, finest first


class FeatureCache:
    """Least recently used out first: from `device` to the host, from there away. For one thread at a time.

    device_bytes, host_bytes: the most that is kept in either place; host_bytes 0 keeps nothing there.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int):
        self._device, self._here, self._host = device, _Tier(device_bytes), _Tier(host_bytes)

    def __contains__(self, key: Key) -> bool:
        return key in self._here.held or key in self._host.held

    @property
    def device_bytes(self) -> int:
        return self._here.bytes

    @property
    def host_bytes(self) -> int:
        return self._host.bytes

    def get(self, key: Key) -> Levels | None:
        """The frame's features on the device, or None."""
        levels = self._here.take(key)
        if levels is None:
            levels = self._host.take(key)
        if levels is not None:
            levels = [level.to(self._device) for level in levels]
            self.put(key, levels)
        return levels

    def put(self, key: Key, levels: Levels) -> None:
        self._here.put(key, levels)
        for old, spilled in self._here.overflow():
            if self._host.limit:
                self._host.put(old, [level.cpu() for level in spilled])
        for _ in self._host.overflow():
            pass


class _Tier:
    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.held: OrderedDict[Key, Levels] = OrderedDict()

    def put(self, key: Key, levels: Levels) -> None:
        self.held[key] = levels
        self.bytes += sum(level.nbytes for level in levels)

    def take(self, key: Key) -> Levels | None:
        levels = self.held.pop(key, None)
        self.bytes -= sum(level.nbytes for level in levels or ())
        return levels

    def overflow(self) -> Iterator[tuple[Key, Levels]]:
        """What had to go, least recently used first."""
        while self.bytes > self.limit:
            key = next(iter(self.held))
            yield key, self.take(key)
