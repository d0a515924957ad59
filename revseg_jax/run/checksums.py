"""What tells that arrays are the ones that were saved: one number each, the same on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> dict[str, int]:
    """The sum of an array's bits, as words of at most 32, modulo 2**32, by the array's path in the tree. All processes
    must call it, and get the same.

    Sums of integers are exact in any order. Noise in the place of a stretch is missed once in 2**32 times.
    """
    sums = jax.device_get(_sums(tree))
    leaves = jax.tree_util.tree_leaves_with_path(sums)
    return {jax.tree_util.keystr(path, simple=True, separator="."): int(value) for path, value in leaves}


def differences(found: dict[str, int], saved: dict[str, int]) -> str | None:
    """In words, which arrays are not as they were saved; None when all of `found` are."""
    wrong = [name for name, value in found.items() if saved.get(name) != value]
    if not wrong:
        return None
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more} is not what was saved"


@jax.jit
def _sums(tree: Any) -> Any:
    def of(array: jax.Array) -> jax.Array:
        word = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
        return jnp.sum(jax.lax.bitcast_convert_type(array, word), dtype=jnp.uint32)

    return jax.tree.map(of, tree)
