"""The order in which a person would number names: 2 before 10, frame_9 before frame_10."""

from __future__ import annotations

import re


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorting key: the numbers in a name by their value, the rest as text. Names that are alike in both, such as a1 and
    a01, stand in the order of their characters, or it would be that of a folder's or a file's entries."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name
