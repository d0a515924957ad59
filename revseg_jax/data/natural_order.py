"""The order in which a person would number names: 2 before 10, frame_9 before frame_10."""

from __future__ import annotations

import re


def natural(name: str) -> list[str | int]:
    """Sorting key: the numbers in a name by their value, the rest as text."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
