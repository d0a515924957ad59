"""What tells that arrays are the ones that were saved: one number each, the same on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> dict[str, int]:
    """A sum over each array's words and their places, by the array's path in the tree. All processes must call it, and
    get the same.

    Words of at most 32 bits are scattered by their place (MurmurHash3's last steps) and added modulo 2**32: exact in
    any order, and other numbers, or the same in other places, are missed once in 2**32 times.
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
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))
        return jnp.sum(_scattered(words.astype(jnp.uint32) ^ _places(words.shape) * jnp.uint32(0x9E3779B1)))

    return jax.tree.map(of, tree)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """uint32 `shape`: the place of each element in the flat array."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return places


def _scattered(words: jax.Array) -> jax.Array:
    words = (words ^ words >> 16) * jnp.uint32(0x85EBCA6B)
    words = (words ^ words >> 13) * jnp.uint32(0xC2B2AE35)
    return words ^ words >> 16
