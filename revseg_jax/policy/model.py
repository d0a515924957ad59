"""The whole policy: vision tower and decoder, and how visual features take their places among the tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from revseg_jax.parallel.sharding import Placement, constrain
from revseg_jax.policy.attention import AttentionChoice
from revseg_jax.policy.config import ModelConfig
from revseg_jax.policy.preprocess import patchify
from revseg_jax.policy.text import Decoder, Prefix
from revseg_jax.policy.vision import VisionTower


class PrefixTokens(NamedTuple):
    """What stands before the answers of a prompt's rollouts.

    Attributes:
      tokens: int32 [B, P], padding after the real ones
      positions: int32 [3, B, P]
      mask: bool [B, P], False for padding
      features: [B, V, hidden] of the video; None without one
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array
    features: jax.Array | None


class Policy(nnx.Module):
    """Qwen2.5-VL. `dtype` is that of the activations; parameters keep their own. `remat`: a name of
    `revseg_jax.policy.remat`. `attention`: of whole sequences."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        attention: AttentionChoice = AttentionChoice(),  # noqa: B008 (frozen)
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.vision = VisionTower(config.vision, rngs=rngs, attention=attention)
        self.text = Decoder(config.text, rngs=rngs, attention=attention)

    @property
    def placement(self) -> Placement | None:
        """Of the activations; None on one device that needs none."""
        return self.text.attention.placement

    def encode(self, frames: jax.Array) -> jax.Array:
        """frames uint8 [B, N, side, side, 3] -> features [B, tokens, hidden].

        N = 1 is an image (the frame stands twice in its temporal patch); otherwise N is even and frames fuse in pairs.
        """
        prompts, count, height, width, _ = frames.shape
        if count == 1:
            frames = jnp.repeat(frames, self.config.vision.temporal_patch_size, axis=1)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        patches = patchify(frames, self.config.vision, wide).astype(self.dtype)
        slices = patches.reshape(-1, *patches.shape[2:])
        patch = self.config.vision.patch_size
        features = self.vision(slices, height // patch, width // patch, remat=self.remat)
        return constrain(self.placement, features.reshape(prompts, -1, features.shape[-1]), "prompts")

    def embed(self, tokens: jax.Array, features: jax.Array | None = None) -> jax.Array:
        """tokens int32 [..., L] -> [..., L, hidden]; the n-th image or video token takes the n-th of `features`
        [..., tokens, hidden]."""
        x = self.text.embed(tokens, self.dtype)
        if features is None:
            return x
        visual = (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)
        order = jnp.clip(jnp.cumsum(visual, axis=-1) - 1, 0, features.shape[-2] - 1)
        # Whole rows are gathered (not take_along_axis, which gathers scalars): the transpose is then a row scatter.
        rows = features.astype(x.dtype).reshape(-1, *features.shape[-2:])
        placed = jax.vmap(lambda feature, index: feature[index])(rows, order.reshape(len(rows), -1)).reshape(x.shape)
        return jnp.where(visual[..., None], placed, x)

    def prefill(self, prefix: PrefixTokens) -> Prefix:
        """Keys and values of the shared prefixes."""
        _, keys, values = self.prefix_forward(prefix.tokens, prefix.positions, prefix.features)
        return Prefix(keys, values, prefix.mask)

    def prefix_forward(
        self, tokens: jax.Array, positions: jax.Array, features: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Final-normed hidden [B, P, width] of whole sequences, and keys and values [layers, B, P, ...]. Arguments as
        in `PrefixTokens`."""
        return self.text.prefill(self.embed(tokens, features), positions, remat=self.remat)

    def suffix_hidden(
        self,
        prefix: PrefixTokens,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        features: jax.Array | None = None,
    ) -> jax.Array:
        """Final-normed hidden [B, G, S, width] of whole suffixes: tokens int32 [B, G, S], positions int32 [3, B, G, S],
        mask bool [B, G, S] (False: padding slots, which nobody sees), features [B, G, K, width] of the keyframes."""
        shared = self.embed(prefix.tokens, prefix.features), prefix.positions, prefix.mask
        return self.text(shared, self.embed(tokens, features), positions, mask, remat=self.remat)


def chunked_logprobs(
    policy: Policy, hidden: jax.Array, targets: jax.Array, chunk: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and the entropy of its distribution, never holding all logits.

    hidden [B, ..., width] final-normed and targets int32 [B, ...]; both results float32 [B, ...]. temperature: static,
    above 0, what the logits are divided by. `chunk` positions of
    a device have their vocabulary logits in memory at a time, in the backward pass too (they are recomputed). Every
    chunk has some positions of all B prompts, so that no device waits for the chunk of another.
    """
    prompts, width = hidden.shape[0], hidden.shape[-1]
    rows, row_targets = hidden.reshape(prompts, -1, width), targets.reshape(prompts, -1)
    count, placement = row_targets.shape[1], policy.placement
    parts = math.gcd(placement.parts("prompts"), prompts) if placement is not None else 1
    positions = max(1, min(count, chunk * parts // prompts))
    chunks = -(-count // positions)
    padding = (0, chunks * positions - count)
    rows = jnp.pad(rows, ((0, 0), padding, (0, 0))).reshape(prompts, chunks, positions, width).swapaxes(0, 1)
    row_targets = jnp.pad(row_targets, ((0, 0), padding)).reshape(prompts, chunks, positions).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk_hidden, chunk_targets = inputs
        logits = policy.text.logits(constrain(placement, chunk_hidden, "prompts"))
        if temperature != 1:
            logits = logits / temperature
        logprobs = jax.nn.log_softmax(constrain(placement, logits, "prompts", None, "vocab"))
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        # A comparison instead of a gather: it fuses, works on a sharded vocabulary and has no scatter as transpose.
        chosen = jnp.arange(logprobs.shape[-1]) == chunk_targets[..., None]
        return jnp.sum(jnp.where(chosen, logprobs, 0.0), axis=-1), entropy

    def joined(array: jax.Array) -> jax.Array:
        return array.swapaxes(0, 1).reshape(prompts, -1)[:, :count].reshape(targets.shape)

    logprobs, entropy = jax.lax.map(one_chunk, (rows, row_targets))
    return joined(logprobs), joined(entropy)
