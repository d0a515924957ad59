"""The turn-2 images: a keyframe that several rollouts of a group chose is encoded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from revseg_jax.policy.model import Policy
from revseg_jax.policy.remat import conditional


def encode_keyframes(policy: Policy, keyframes: jax.Array, index: jax.Array) -> jax.Array:
    """Features [B, G, tokens, hidden] of each rollout's keyframe; of any where `index` is -1.

    keyframes: uint8 [B, G, side, side, 3], a prompt's different ones first; index: int32 [B, G], which of them.
    The n-th keyframes of all prompts are encoded together, for as many n as the prompt with the most of them has: the
    shapes stay fixed, no image goes to another device, and the rounds that nobody needs are not run.
    """
    rounds = jnp.arange(keyframes.shape[1])
    empty = jnp.zeros_like(jax.eval_shape(policy.encode, keyframes[:, :1]))

    def encode(number: jax.Array, images: jax.Array) -> jax.Array:
        return jax.lax.cond(number <= index.max(), lambda: policy.encode(images[:, None]), lambda: empty)

    encode = conditional(encode, policy.remat)
    _, features = jax.lax.scan(lambda _, each: (None, encode(*each)), None, (rounds, keyframes.swapaxes(0, 1)))
    return jax.vmap(lambda of_prompt, chosen: of_prompt[chosen], (1, 0))(features, jnp.maximum(index, 0))
