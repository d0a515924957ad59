"""What the backward pass keeps of a layer's forward pass and what it computes again, by JAX's names."""

from __future__ import annotations

from collections.abc import Callable

import jax

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}
"""From the least memory to the most. Kept are a layer's input alone; its products with weights too, so that only
attention and element-wise work is done twice; every matrix product, the attention scores included."""


def rematerialised(layer: Callable, name: str) -> Callable:
    """`layer` under the policy of that name; "none" keeps all that the backward pass uses."""
    return layer if name == "none" else jax.checkpoint(layer, policy=POLICIES[name])
