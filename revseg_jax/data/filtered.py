"""What `revseg filter` decided about a prepared folder; all that reads clips abides by it, but the filter itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError
from revseg_jax.paths import path_of, write_whole

DECISIONS = "filter.json"


def read_dropped(folder: str | Path, split: str) -> set[str]:
    """Ids of the videos of a split that are left out. Raises InputError when the file is damaged."""
    path = path_of(folder) / DECISIONS
    if not path.exists():
        return set()
    try:
        content = json.loads(path.read_text())
        return set(content["dropped"]) if content["split"] == split else set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error!r}: delete it or run `revseg filter` again") from None


def write_decisions(folder: Path, content: dict[str, Any]) -> None:
    """`content` holds `split` and `dropped`, and what a person wants to know."""
    write_whole(folder / DECISIONS, json.dumps(content, indent=2) + "\n")


def fingerprint_without(fingerprint: str, dropped: Collection[str]) -> str:
    """The fingerprint of a folder's content after its videos were dropped."""
    if not dropped:
        return fingerprint
    return hashlib.sha256(json.dumps([fingerprint, sorted(dropped)]).encode()).hexdigest()
