"""Drawing tokens: what is sampled, from which distribution, with whose randomness."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from revseg_jax.config import RolloutConfig
from revseg_jax.policy.model import Policy
from revseg_jax.policy.rope import decoder_rotation
from revseg_jax.policy.text import PrefixCache, SuffixCache


@dataclass(frozen=True)
class SamplingConfig:
    """Static settings of the decoding loop. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    end_token: int
    pad_token: int
    forbidden: tuple[int, ...]  # tokens that are never sampled: placeholders, other ends, unused ids

    def greedy(self) -> SamplingConfig:
        return SamplingConfig(0.0, 1.0, 0, self.end_token, self.pad_token, self.forbidden)


def sampling_config(tokenizer, vocab_size: int, rollout: RolloutConfig) -> SamplingConfig:
    """A policy that emits a vision placeholder would make the next prompt's tokens and features disagree; one that ends
    a text, instead of its turn, would go on to the limit."""
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    names += ("<|im_start|>", "<|endoftext|>")
    forbidden = [tokenizer.convert_tokens_to_ids(name) for name in names]
    forbidden += range(len(tokenizer), vocab_size)  # the embedding table is padded beyond the vocabulary
    return SamplingConfig(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        end_token=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        forbidden=tuple(forbidden),
    )


def rollout_keys(seed: int, step: int, prompts: np.ndarray, group_size: int) -> jax.Array:
    """Keys [B, G] that depend on (seed, step, prompt, sample) only: any batching or mesh draws the same numbers.

    prompts: int [B], the running index of each prompt in the whole run.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    of_prompts = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(prompts, jnp.uint32))
    samples = jnp.arange(group_size)
    return jax.vmap(lambda k: jax.vmap(lambda s: jax.random.fold_in(k, s))(samples))(of_prompts)


def draw(logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Next tokens int32 [B, G] and their log-probabilities float32 [B, G] from logits float32 [B, G, vocab].

    The log-probability is that of the whole distribution, untruncated, at the temperature of sampling (1 when greedy):
    what the trainer computes.
    """
    if config.temperature not in (0, 1):
        logits = logits / config.temperature
    logprobs = jax.nn.log_softmax(logits)
    allowed = np.ones(logits.shape[-1], bool)
    allowed[list(config.forbidden)] = False
    scores = jnp.where(allowed, logits, -jnp.inf)
    if config.temperature > 0:  # as `jax.random.categorical` draws
        scores = truncate(scores, config.top_p, config.top_k)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[-1:], scores.dtype)))(keys)
        scores += noise
    tokens = first_largest(scores).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def first_largest(scores: jax.Array) -> jax.Array:
    """`argmax` over the last axis, in two passes: on a CPU the one of argmax takes in all that comes before it, here
    the drawing of the noise, on one thread."""
    size = scores.shape[-1]
    smaller = scores < scores.max(axis=-1, keepdims=True)
    return jnp.where(smaller, size, jnp.arange(size)).min(axis=-1)


def truncate(logits: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """Sets to -inf what lies outside the top k tokens or outside the smallest set of probability >= top_p."""
    if top_k > 0:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.where(before < top_p, ordered, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits


def decode_answer(
    policy: Policy,
    prefix: PrefixCache,
    cache: SuffixCache,
    token: jax.Array,
    position: jax.Array,
    alive: jax.Array,
    keys: jax.Array,
    slot: int,
    limit: int,
    config: SamplingConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, SuffixCache]:
    """Samples one answer for every rollout until all have ended or the limit is reached.

    token, position int32 [B, G]: the last token of the prompt, not yet in the cache, that stands at `slot`; the answer
    goes to the slots after it. alive bool [B, G]: rollouts that take part. keys [B, G].
    Returns tokens int32 [B, G, limit] (padded), logprobs float32 [B, G, limit], real bool [B, G, limit], and the cache
    with the whole answer in it, its end token included.
    """

    inputs = policy.text.layer_inputs(prefix)
    # Of all tokens at once: within the loop the compiler would take the cosines of every layer and head again.
    positions = jnp.broadcast_to(position[..., None] + jnp.arange(limit + 1), (3, *position.shape, limit + 1))
    rotations = decoder_rotation(policy.config.text, positions, policy.dtype)

    def step(state):
        index, token, real, tokens, logprobs, reals, cache = state
        x = policy.embed(token[..., None])
        rotation = [jax.lax.dynamic_slice_in_dim(part, index, 1, axis=2) for part in rotations]
        hidden, cache = policy.text.extend(x, rotation, real[..., None], slot + index, inputs, prefix.mask, cache)
        step_keys = jax.vmap(jax.vmap(partial(jax.random.fold_in, data=slot + index)))(keys)
        following, logprob = draw(policy.text.logits(hidden[:, :, 0]), step_keys, config)
        emitted = real & ((index == 0) | (token != config.end_token))
        following = jnp.where(emitted, following, config.pad_token)
        at = (0, 0, index)
        tokens = jax.lax.dynamic_update_slice(tokens, following[..., None], at)
        logprobs = jax.lax.dynamic_update_slice(logprobs, jnp.where(emitted, logprob, 0.0)[..., None], at)
        reals = jax.lax.dynamic_update_slice(reals, emitted[..., None], at)
        return index + 1, following, emitted, tokens, logprobs, reals, cache

    def going_on(state):
        # One step more than the limit: it puts the last token, if it is an end token, into the cache.
        return (state[0] <= limit) & state[2].any()

    shape = (*token.shape, limit + 1)
    empty = (jnp.full(shape, config.pad_token, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    state = (jnp.int32(0), token, alive, *empty, cache)
    _, _, _, tokens, logprobs, reals, cache = jax.lax.while_loop(going_on, step, state)
    return tokens[..., :limit], logprobs[..., :limit], reals[..., :limit], cache
