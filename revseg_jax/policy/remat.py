"""What the backward pass keeps of a layer's forward pass and what it computes again, by JAX's names."""

from __future__ import annotations

from collections.abc import Callable

import jax

from revseg_jax.policy.attention_plain import KEPT

_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_with_no_batch_dims": _products,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _products, jax.checkpoint_policies.save_only_these_names(KEPT)
    ),
}
"""From the least memory to the most. Kept are a layer's input alone; its products with weights too, so that only
attention and element-wise work is done twice; attention's result too, so that only element-wise work is."""

BLOCK_INPUT = "block input"  # what goes into a block of the vision tower, and what comes out of the last


def rematerialised(layer: Callable, name: str) -> Callable:
    """`layer` under the policy of that name; "none" keeps all that the backward pass uses."""
    return layer if name == "none" else jax.checkpoint(layer, policy=POLICIES[name])


def conditional(function: Callable, name: str) -> Callable:
    """`function`, which runs marked blocks in a branch of a condition. Under "full" the backward pass keeps what is
    marked and nothing else; by itself JAX keeps all that a branch reads, parameters too, anew each time it runs."""
    inputs = jax.checkpoint_policies.save_only_these_names(BLOCK_INPUT)
    return jax.checkpoint(function, policy=inputs) if name == "full" else function
