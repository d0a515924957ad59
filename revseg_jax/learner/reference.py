"""Where the frozen reference policy lives between its one pass a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def store_reference(kind: str, trained: Any) -> Any:
    """The parameters to keep. kind "device": `trained` itself; "bfloat16": a copy in bfloat16; "host": such a copy in
    host memory, each host holding what its devices hold of `trained`."""
    if kind == "device":
        return trained
    small = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16), tree))(trained)
    return _moved(small, "pinned_host") if kind == "host" else small


def fetch_reference(kind: str, stored: Any) -> Any:
    """What was stored, on the devices."""
    return _moved(stored, "device") if kind == "host" else stored


def _moved(tree: Any, memory: str) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree))
