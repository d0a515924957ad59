"""Reads packed conversations: one jitted function encodes what is seen, one reads the whole conversation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.parallel.sharding import Placement
from revseg_jax.policy.model import Policy
from revseg_jax.policy.packing import PackedConversations, PackedVision


def encode(policy: Policy, vision: PackedVision) -> jax.Array:
    """Features [tokens in the packed layout, hidden] of all images and videos."""
    features = policy.vision.packed(
        vision.patches.astype(policy.dtype), vision.places, vision.segments, remat=policy.remat
    )
    return features.reshape(-1, features.shape[-1])


def hidden_states(policy: Policy, packed: PackedConversations, features: jax.Array | None) -> jax.Array:
    """Final-normed hidden [B, L, hidden], in the order in which the tokens came; features [n, hidden] of `encode`."""
    x = policy.text.embed(packed.tokens, policy.dtype)
    if features is not None:
        placed = features.astype(x.dtype)[jnp.maximum(packed.features, 0)]
        x = jnp.where((packed.features >= 0)[..., None], placed, x)
    hidden, _, _ = policy.text.prefill(x, jnp.moveaxis(packed.positions, 1, 0), remat=policy.remat)
    return jnp.take_along_axis(hidden, packed.slots[..., None], axis=1)


encode_jitted = jax.jit(encode)


@partial(jax.jit, static_argnames="placement")
def logits_jitted(
    policy: Policy, packed: PackedConversations, features: jax.Array | None, placement: Placement | None
) -> jax.Array:
    logits = policy.text.logits(hidden_states(policy, packed, features))
    # On every device, so that each process of a run on several hosts can read it.
    return jax.lax.with_sharding_constraint(logits, placement.whole) if placement is not None else logits


def conversation_logits(policy: Policy, packed: PackedConversations, placement: Placement | None = None) -> np.ndarray:
    """float32 [B, L, vocab], of the packed sizes. placement: of the policy's parameters, if not on one device."""
    features = encode_jitted(policy, spread(packed.vision, placement)) if packed.vision is not None else None
    return np.asarray(logits_jitted(policy, spread(packed._replace(vision=None), placement), features, placement))


def spread(arrays: Any, placement: Placement | None) -> Any:
    """Arrays on the mesh, the first axis as the prompts are where that divides. Every process has all of them."""
    if placement is None:
        return arrays
    return jax.tree.map(lambda array: jax.device_put(array, placement.sharding(array.shape, "prompts")), arrays)
