"""PPO's side of a step: rewards of tokens, generalised advantage estimation over both turns, and the critic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def init_critic(kind: str, trained: Any, width: int) -> dict[str, Any]:
    """Parameters of a critic: a value head that answers 0 and, for kind "trunk", a copy of the policy's own."""
    critic = {"head": {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}}
    return critic | {"trunk": jax.tree.map(jnp.copy, trained)} if kind == "trunk" else critic


def token_values(critic: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Values float32 [B, G, S] of the states before each token, from hidden [B, G, S, width] at each; slot 0 gets 0."""
    head = critic["head"]
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    values = wide[:, :, :-1] @ head["kernel"] + head["bias"]
    return jnp.pad(values, ((0, 0), (0, 0), (1, 0)))


def token_rewards(rewards: jax.Array, penalty: jax.Array | None, generated: jax.Array, turns: jax.Array) -> jax.Array:
    """Rewards float32 [B, G, S]: each turn's at its last token, less each token's penalty.

    rewards [B, G, 2] of the turns; penalty [B, G, S] or None; generated bool [B, G, S]; turns int [S], 0 or 1, of the
    slots. The slots between the turns hold a prompt, so a turn ends where the next slot is not generated.
    """
    last = generated & ~jnp.pad(generated[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    at_ends = jnp.where(last, rewards[:, :, turns], 0.0)
    return at_ends if penalty is None else at_ends - jnp.where(generated, penalty, 0.0)


def generalised_advantages(
    rewards: jax.Array, values: jax.Array, generated: jax.Array, discount: float, gae_lambda: float
) -> jax.Array:
    """Advantages [B, G, S] of generated tokens, 0 elsewhere (arXiv 1506.02438, equation 16).

    A rollout is one episode over both turns: what follows the last token of turn 1 is the first of turn 2, and the
    prompt between them takes no time.
    """

    def step(following, slot):
        next_value, next_advantage = following
        reward, value, real = slot
        delta = reward + discount * next_value - value
        advantage = delta + discount * gae_lambda * next_advantage
        carried = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return carried, jnp.where(real, advantage, 0.0)

    slots = tuple(jnp.moveaxis(array, -1, 0) for array in (rewards, values, generated))
    nothing = jnp.zeros_like(values[..., 0])
    _, advantages = jax.lax.scan(step, (nothing, nothing), slots, reverse=True)
    return jnp.moveaxis(advantages, 0, -1)


def whiten(advantages: jax.Array, generated: jax.Array) -> jax.Array:
    """Mean 0 and deviation 1 over all generated tokens."""
    count = jnp.maximum(generated.sum(), 1)
    centred = jnp.where(generated, advantages - jnp.where(generated, advantages, 0.0).sum() / count, 0.0)
    return centred * jax.lax.rsqrt((centred**2).sum() / count + 1e-8)
