"""Short digests of what a training step computed: two runs are the same when all of them are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

STAGES = ("data", "tokens", "rewards", "update")  # in the order in which a step computes them


def digest(parts: Iterable[Any]) -> str:
    """16 hex digits over arrays (their bytes, shapes and types), strings and numbers (their exact repr)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | jax.Array):
            array = np.asarray(part)
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        else:
            total.update(repr(part).encode())
    return total.hexdigest()[:16]


def parameter_digest(parameters: Any) -> str:
    """Over every leaf and its path. Fetches all of them: meant for the end of a run, not for its steps."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return digest(part for path, leaf in leaves for part in (jax.tree_util.keystr(path), leaf))
