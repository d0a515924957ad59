"""Prepared folders: array_record files that TFDS reads, and a `prepared.json` that says what is in them.

A folder appears under its final name only when it is complete, so one with a `prepared.json` can be trusted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError
from revseg_jax.paths import path_of

MARKER = "prepared.json"
FORMAT = 2


def read_prepared(folder: str | Path) -> dict[str, Any]:
    """The content of `prepared.json`: settings, fingerprint, splits. Raises InputError in one line."""
    path = path_of(folder) / MARKER
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a prepared dataset ({MARKER} is missing): write it with `revseg prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is of another format than {FORMAT}: prepare the dataset again")
    return content
