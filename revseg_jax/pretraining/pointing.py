"""Teaches one attention head where to look when an answer is about to name the object that a query means.

The words alone teach it too, but only after several thousand clips: until the head looks at the right object, the loss
of the name does not say where else to look.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from revseg_jax.policy.attention_plain import MASKED

HEAD = 0
OBJECTS = 5  # of a clip, at most


def shown_objects(objects: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """bool [B, P, OBJECTS]: the object shows in one of the patches of the prefix token.

    objects: int32 [B, slices, tokens, temporal, merged], -1 for none; start: of the video among the P = length tokens.
    """
    shows = (objects[..., None] == jnp.arange(OBJECTS)).any((3, 4)).reshape(len(objects), -1, OBJECTS)
    return jax.lax.dynamic_update_slice(jnp.zeros((len(objects), length, OBJECTS), bool), shows, (0, start, 0))


def pointing_loss(
    queries: jax.Array,
    keys: jax.Array,
    prefix_keys: jax.Array,
    visible: jax.Array,
    pointers: jax.Array,
    shows: jax.Array,
) -> jax.Array:
    """Mean negative logarithm of the attention that the head pays to the object meant.

    Of one layer: queries, keys [B, G, S, H, D] of the suffixes, prefix_keys [B, P, H, D]; visible bool [B, G, S, S].
    pointers int32 [B, G, M, 2]: the slot from which a name is predicted and its object, -1 where there is none; shows
    as from `shown_objects`.
    """
    slot, target = jnp.maximum(pointers[..., 0], 0), jnp.maximum(pointers[..., 1], 0)
    asking = jnp.take_along_axis(queries[..., HEAD, :], slot[..., None], axis=2) * queries.shape[-1] ** -0.5
    own = jnp.einsum("bgmd,bgsd->bgms", asking, keys[..., HEAD, :])
    own = jnp.where(jnp.take_along_axis(visible, slot[..., None], axis=2), own, MASKED)
    shared = jnp.einsum("bgmd,bpd->bgmp", asking, prefix_keys[..., HEAD, :])
    meant = jnp.einsum("bpo,bgmo->bgmp", shows, jax.nn.one_hot(target, OBJECTS)) > 0
    everywhere = jax.nn.logsumexp(jnp.concatenate([own, shared], -1), axis=-1)
    there = jax.nn.logsumexp(jnp.where(meant, shared, MASKED), axis=-1)
    counts = (pointers[..., 0] >= 0) & meant.any(-1)
    return ((everywhere - there) * counts).sum() / jnp.maximum(counts.sum(), 1)
