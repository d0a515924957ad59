"""Qwen2.5-VL's decoder over the project's static layout: a shared prefix and G suffixes of S slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from revseg_jax.parallel.sharding import constrain
from revseg_jax.policy.attention import AttentionChoice, attention, cached_attention, suffix_attention
from revseg_jax.policy.config import TextConfig
from revseg_jax.policy.layers import GatedMLP, Linear, RMSNorm, stack_layers
from revseg_jax.policy.remat import rematerialised
from revseg_jax.policy.rope import decoder_rotation, rotate


class Prefix(NamedTuple):
    """Keys and values of the prefix tokens, one per prompt and shared by its G rollouts.

    Attributes:
      key, value: [layers, B, P, key_heads, head_dim]
      mask: bool [B, P], False for padding, which stands after the real tokens
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array

    def cache(self) -> PrefixCache:
        return PrefixCache(jnp.moveaxis(self.key, 2, -1), jnp.moveaxis(self.value, 2, -2), self.mask)


class PrefixCache(NamedTuple):
    """A prefix as decoding reads it, laid out once: every step multiplies these matrices as they lie.

    Attributes:
      key: [layers, B, key_heads, head_dim, P]
      value: [layers, B, key_heads, P, head_dim]
      mask: bool [B, P], False for padding
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


class SuffixCache(NamedTuple):
    """Keys and values of the suffix slots filled so far, laid out as a prefix's.

    Attributes:
      key: [layers, B, key_heads, G, head_dim, S]
      value: [layers, B, key_heads, G, S, head_dim]
      mask: bool [B, G, S], True where the slot holds a real token
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array

    def widened(self, slots: int) -> SuffixCache:
        """With so many slots, the new ones empty."""
        more = (0, slots - self.mask.shape[-1])
        return SuffixCache(
            key=jnp.pad(self.key, [*[(0, 0)] * 5, more]),
            value=jnp.pad(self.value, [*[(0, 0)] * 4, more, (0, 0)]),
            mask=jnp.pad(self.mask, [(0, 0), (0, 0), more]),
        )


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        heads, key_heads = config.num_heads, config.num_kv_heads
        self.input_norm = RMSNorm(width, config.rms_norm_eps)
        self.query = Linear((width, heads, head_dim), (heads, head_dim), rngs=rngs)
        self.key = Linear((width, key_heads, head_dim), (key_heads, head_dim), rngs=rngs)
        self.value = Linear((width, key_heads, head_dim), (key_heads, head_dim), rngs=rngs)
        self.out = Linear((heads, head_dim, width), rngs=rngs)
        self.post_norm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_size, use_bias=False, rngs=rngs)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., S, width] -> rotated query [..., S, H, D], rotated key and value [..., S, K, D]."""
        normal = self.input_norm(x)
        query, key, value = (part("...d,dhk->...hk", normal) for part in (self.query, self.key, self.value))
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = x + self.out("...hk,hkd->...d", mixed)
        return x + self.mlp(self.post_norm(x))


class Decoder(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, attention: AttentionChoice):
        self.config = config
        self.attention = attention
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * 0.02)
        self.layers = stack_layers(lambda layer_rngs: DecoderLayer(config, rngs=layer_rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear((config.hidden_size, config.vocab_size), rngs=rngs)

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [...] -> [..., hidden] in `dtype`."""
        # Rows are looked up where their tokens are, so the table's width comes together first.
        table = constrain(self.attention.placement, self.embedding[...].astype(dtype), "vocab", None)
        return constrain(self.attention.placement, table[tokens], "prompts")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-normed hidden [..., width] -> float32 [..., vocab] (float64 for float64 activations)."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        if self.config.tie_word_embeddings:
            kernel = constrain(self.attention.placement, self.embedding[...].astype(hidden.dtype), "vocab", None)
            return jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=wide)
        kernel = constrain(self.attention.placement, self.lm_head.kernel[...].astype(hidden.dtype), None, "vocab")
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=wide)

    def prefill(
        self, x: jax.Array, positions: jax.Array, remat: str = "none"
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs whole sequences. Padding must stand after the real tokens: none of these sees it then.

        x [B, P, width]; positions int32 [3, B, P].
        Returns the final-normed hidden [B, P, width] and keys, values [layers, B, P, key_heads, head_dim].
        """

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return attention(query, key, value, None, causal=True, choice=self.attention)[0]

        x, (keys, values) = self._run_layers(x, positions, attend, remat)
        return self.norm(x), keys, values

    def __call__(
        self,
        prefix: tuple[jax.Array, jax.Array, jax.Array],
        x: jax.Array,
        positions: jax.Array,
        real: jax.Array,
        remat: str = "none",
    ) -> jax.Array:
        """Runs prefixes and their whole suffixes at once, layer by layer: all that depends on a layer's parameters is
        one product, so these are gathered, and their gradients summed, once.

        prefix: x [B, P, width], positions int32 [3, B, P] and mask bool [B, P], padding after the real tokens.
        x [B, G, S, width]; positions int32 [3, B, G, S]; real bool [B, G, S]: a token sees the prefix and the real
        slots up to its own.
        Returns the final-normed hidden [B, G, S, width] of the suffixes.
        """
        prefix_x, prefix_positions, prefix_mask = prefix
        shape, length = x.shape[:3], prefix_x.shape[1]

        def apart(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            return rows[:, :length], rows[:, length:].reshape(*shape, *rows.shape[2:])

        def together(shared: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.concatenate([shared, own.reshape(shape[0], -1, *own.shape[3:])], 1)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            (shared_query, query), (shared_key, key), (shared_value, value) = map(apart, (query, key, value))
            shared = attention(shared_query, shared_key, shared_value, None, causal=True, choice=self.attention)[0]
            known = shared_key, shared_value, prefix_mask
            return together(shared, suffix_attention(query, key, value, real, known, self.attention))

        joined = jnp.concatenate([prefix_positions, positions.reshape(3, shape[0], -1)], -1)
        x, _ = self._run_layers(together(prefix_x, x), joined, attend, remat)
        return self.norm(apart(x)[1])

    def _run_layers(
        self, x: jax.Array, positions: jax.Array, attend: Callable, remat: str
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x [B, L, width], positions [3, B, L]; `attend(query, key, value)` mixes the values of all L slots. Returns x
        and the layers' keys, values."""
        cos, sin = decoder_rotation(self.config, positions, x.dtype)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, state: nnx.State) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            module = nnx.merge(graphdef, state)
            x = constrain(self.attention.placement, x, "prompts")
            query, key, value = module.project(x, cos, sin)
            return module.finish(x, attend(query, key, value)), (key, value)

        return jax.lax.scan(rematerialised(layer, remat), x, stacked)

    def layer_inputs(self, prefix: PrefixCache) -> tuple | list[tuple]:
        """What `extend` reads in each layer: its index, parameters, and part of the prefix; stacked, to scan over.

        On TPUs products read their part of a stack in place. Elsewhere a step of a scan copies it first, a third of the
        time of decoding on a CPU and of the bytes on a GPU. There the parts are copied here, before the loop over
        tokens, and come as a list.
        """
        indices, stacked = range(self.config.num_layers), (nnx.state(self.layers), prefix.key, prefix.value)
        if self.attention.platform == "tpu":
            return jnp.array(indices), *stacked
        parts = [jax.tree.map(lambda stack, index=index: stack[index], stacked) for index in indices]
        return [(index, *part) for index, part in enumerate(jax.lax.optimization_barrier(parts))]

    def extend(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        real: jax.Array,
        slot: jax.Array,
        inputs: tuple | list[tuple],
        prefix_mask: jax.Array,
        cache: SuffixCache,
    ) -> tuple[jax.Array, SuffixCache]:
        """Appends tokens to every suffix at slots [slot, slot + S), S = 1 in decoding. No gradient is meant to flow.

        x [B, G, S, width]; rotation: cos, sin [B, G, S, head_dim] of `decoder_rotation`; real bool [B, G, S]; inputs of
        `layer_inputs`, and the mask of its prefix. A token sees the prefix, the real slots before it and itself.
        Returns the final-normed hidden [B, G, S, width] and the cache with the slots filled.
        """
        graphdef = nnx.graphdef(self.layers)
        filled = jax.lax.dynamic_update_slice(cache.mask, real, (0, 0, slot))

        def layer(carry, read):
            x, keys, values = carry
            index, state, prefix_key, prefix_value = read
            module = nnx.merge(graphdef, state)
            query, key, value = module.project(x, *rotation)
            key, value = jnp.transpose(key, (0, 3, 1, 4, 2)), jnp.transpose(value, (0, 3, 1, 2, 4))
            keys = jax.lax.dynamic_update_slice(keys, key[None].astype(keys.dtype), (index, 0, 0, 0, 0, slot))
            values = jax.lax.dynamic_update_slice(values, value[None].astype(values.dtype), (index, 0, 0, 0, slot, 0))
            own, shared = (keys[index].mT, values[index], filled), (prefix_key.mT, prefix_value, prefix_mask)
            mixed = cached_attention(query, own, shared, slot, self.attention)
            return (module.finish(x, mixed), keys, values), None

        carry = (x, cache.key, cache.value)
        if isinstance(inputs, list):
            for read in inputs:
                carry, _ = layer(carry, read)
        else:
            carry, _ = jax.lax.scan(layer, carry, inputs)
        x, keys, values = carry
        return self.norm(x), SuffixCache(keys, values, filled)


def empty_suffix_cache(config: TextConfig, prompts: int, groups: int, slots: int, dtype: jnp.dtype) -> SuffixCache:
    lead = (config.num_layers, prompts, config.num_kv_heads, groups)
    key, value = (*lead, config.head_dim, slots), (*lead, slots, config.head_dim)
    return SuffixCache(jnp.zeros(key, dtype), jnp.zeros(value, dtype), jnp.zeros((prompts, groups, slots), bool))
