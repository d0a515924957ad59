"""The rollout engine: a prompt is read once, then G rollouts answer, look at their keyframes and answer again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from revseg_jax.chain.geometry import box_to_original
from revseg_jax.chain.parsing import Turn1, Turn2, parse_one_turn, parse_turn1, parse_turn2
from revseg_jax.data.frames import decode_square
from revseg_jax.data.processes import cores
from revseg_jax.parallel.rows import own_rows, place_rows
from revseg_jax.parallel.sharding import Placement, constrain, tree_shardings
from revseg_jax.policy.model import Policy, PrefixTokens
from revseg_jax.policy.rope import decoder_rotation
from revseg_jax.policy.text import PrefixCache, SuffixCache, empty_suffix_cache
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.chains import Rollout
from revseg_jax.rollout.keyframes import encode_keyframes
from revseg_jax.rollout.layout import PromptEncoder
from revseg_jax.rollout.sampling import SamplingConfig, decode_answer


@dataclass(frozen=True)
class Prompt:
    """One video and query.

    Attributes:
      query: the user's question
      frames: uint8 [N, side, side, 3], the shown frames, square, repeating the last one up to N = chain.frames
      frame_count: how many of them are real
      seconds: duration of the whole clip
      jpegs: the real ones at original size, encoded; the keyframe is taken from here
      size: height and width of the original frames, pixels
    """

    query: str
    frames: np.ndarray
    frame_count: int
    seconds: float
    jpegs: Sequence[bytes]
    size: tuple[int, int]


@dataclass(frozen=True)
class RolloutEngine:
    """Samples chains. Each phase is one jitted function; shapes, and so programs, depend on B, G and the config only.

    Attributes:
      graphdef: of the policy whose parameters each call gets (`nnx.split(policy)`)
      encoder: prompts to tokens
      sampling: how tokens are drawn
      placement: of prompts, activations and KV caches on the devices
    """

    graphdef: nnx.GraphDef
    encoder: PromptEncoder
    sampling: SamplingConfig
    placement: Placement

    def weights(self, params: Any) -> Any:
        """The parameters as sampling wants them: in the activations' type, gathered over the axis "width" as the
        table's rollout_width says. Made once for many tokens; arrays that are so already are taken as they are."""
        dtype = nnx.merge(self.graphdef, *params).dtype
        leaves, tree = jax.tree.flatten(params)
        wanted = jax.tree.leaves(tree_shardings(params, self.placement.with_width("rollout_width")))
        others = [
            index
            for index, (leaf, sharding) in enumerate(zip(leaves, wanted, strict=True))
            if leaf.dtype != dtype or not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        ]
        cast = _cast(dtype, tuple(wanted[index] for index in others), [leaves[index] for index in others])
        for index, array in zip(others, cast, strict=True):
            leaves[index] = array
        return jax.tree.unflatten(tree, leaves)

    def sample(
        self, params: Any, prompts: Sequence[Prompt], keys: jax.Array
    ) -> tuple[RolloutBatch, list[list[Rollout]]]:
        """G rollouts for each of B prompts. params: of `weights`, or the parameters themselves; keys: [B, G] (see
        `rollout_keys`). Of several processes each gives its own prompts, all equally many. Returns the arrays, on the
        host, and the chains."""
        layout, config = self.encoder.layout, self.sampling
        place = partial(place_rows, self.placement)
        frames = np.stack([prompt.frames for prompt in prompts])
        prefixes = [self.encoder.prefix(p.query, p.frame_count, p.seconds) for p in prompts]
        tokens, positions, mask = (np.stack([getattr(p, n) for p in prefixes]) for n in ("tokens", "positions", "mask"))
        count, group = keys.shape
        keys = place(np.asarray(jax.random.key_data(keys)))

        cache = read_prefix(self.graphdef, params, *map(place, (frames, tokens, positions, mask)))
        # Turn 1: every rollout goes on from the prompt's last token, which stands in slot 0.
        first = np.tile(np.array([[p.last_token] for p in prefixes], np.int32), group)
        start = np.tile(np.array([[p.last_position] for p in prefixes], np.int32), group)
        alive = np.ones((count, group), bool)
        answers, suffix = answer_turn1(
            self.graphdef, layout.turn1, layout.suffix, config, params, cache, *map(place, (first, start, alive)), keys
        )
        tokens1, logprobs1, real1 = map(own_rows, answers)
        texts1 = self._texts(tokens1, real1)
        lengths1 = real1.sum(-1)
        ended1 = _ended(tokens1, real1, config.end_token)
        parsed = [
            [self._parse_first(texts1[b][g], prompts[b].frame_count, ended1[b, g]) for g in range(group)]
            for b in range(count)
        ]

        # Turn 2: the same conversation goes on, with the chosen frame at high resolution.
        turns1 = [[turn1 if turn1.ok and turn2 is None else None for turn1, turn2 in row] for row in parsed]
        alive = np.array([[turn1 is not None for turn1 in row] for row in turns1])
        prompt2, positions2, mask2, next2 = self._turn2_arrays(turns1, start + lengths1 + 1)
        keyframes, keyframe_index = self._keyframes(prompts, turns1)
        if self.encoder.chain.turns == 2:
            suffix = read_turn2(
                self.graphdef,
                layout.turn2_prompt_start,
                params,
                cache,
                suffix,
                *map(place, (prompt2[..., :-1], positions2[..., :-1], mask2[..., :-1], keyframes, keyframe_index)),
            )
            answers, _ = answer_turn2(
                self.graphdef,
                layout.turn2_start - 1,
                layout.turn2,
                config,
                params,
                cache,
                suffix,
                *map(place, (prompt2[..., -1], next2 - 1, alive)),
                keys,
            )
            tokens2, logprobs2, real2 = map(own_rows, answers)
        else:
            tokens2, logprobs2, real2 = (np.zeros((count, group, 0), kind) for kind in (np.int32, np.float32, bool))
        texts2 = self._texts(tokens2, real2)
        ended2 = _ended(tokens2, real2, config.end_token)

        chains = []
        for b, prompt in enumerate(prompts):
            row = []
            for g, (turn1, turn2) in enumerate(parsed[b]):
                if alive[b, g]:
                    turn2 = parse_turn2(texts2[b][g]) if ended2[b, g] else _unfinished(Turn2)
                box = None
                if turn2 is not None and turn2.ok:
                    box = box_to_original(turn2.box, self.encoder.chain.box_size, *prompt.size)
                row.append(
                    Rollout(
                        answer1=texts1[b][g],
                        answer2=texts2[b][g] if alive[b, g] else None,
                        turn1=turn1,
                        turn2=turn2,
                        box=box,
                        truncated=bool(not ended1[b, g] or (alive[b, g] and not ended2[b, g])),
                        tokens1=int(lengths1[b, g]),
                        tokens2=int(real2[b, g].sum()),
                    )
                )
            chains.append(row)

        answer1_positions = start[..., None] + 1 + np.arange(layout.turn1)
        answer2_positions = next2[..., None] + np.arange(layout.turn2)
        zeros = np.zeros((count, group, 1))
        turn2_zeros = np.zeros(prompt2.shape)
        batch = RolloutBatch(
            frames=frames,
            prefix_tokens=tokens,
            prefix_positions=positions,
            prefix_mask=mask,
            keyframes=keyframes,
            keyframe_index=keyframe_index,
            tokens=np.concatenate([first[..., None], tokens1, prompt2, tokens2], -1),
            positions=np.concatenate(
                [_three(start[..., None]), _three(answer1_positions), positions2, _three(answer2_positions)], -1
            ).astype(np.int32),
            mask=np.concatenate([zeros + 1, real1, mask2, real2], -1).astype(bool),
            generated=np.concatenate([zeros, real1, turn2_zeros, real2], -1).astype(bool),
            logprobs=np.concatenate([zeros, logprobs1, turn2_zeros, logprobs2], -1).astype(np.float32),
        )
        return batch, chains

    def _texts(self, tokens: np.ndarray, real: np.ndarray) -> list[list[str]]:
        """Answers as text, special tokens other than the end token included: they make a parse fail, as they should."""
        kept = real & (tokens != self.sampling.end_token)
        decode = self.encoder.tokenizer.decode
        return [
            [decode(row[keep]) for row, keep in zip(*group, strict=True)] for group in zip(tokens, kept, strict=True)
        ]

    def _parse_first(self, text: str, frames: int, ended: bool) -> tuple[Turn1, Turn2 | None]:
        """What the first answer says; the box too in a chain of one turn."""
        if not ended:
            return _unfinished(Turn1), None
        return (parse_turn1(text, frames), None) if self.encoder.chain.turns == 2 else parse_one_turn(text, frames)

    def _turn2_arrays(self, turns: list[list[Turn1 | None]], start: np.ndarray):
        """Turn-2 prompts of all rollouts [B, G, Q]; those without a second turn (None) get padding only."""
        layout = self.encoder.layout
        shape = (*start.shape, layout.turn2_prompt)
        tokens, mask = np.full(shape, self.sampling.pad_token, np.int32), np.zeros(shape, bool)
        positions, following = np.zeros((*start.shape, 3, layout.turn2_prompt), np.int32), np.ones_like(start)
        for b, g in np.ndindex(*start.shape):
            if turns[b][g] is not None:
                encoded = self.encoder.turn2(turns[b][g].description, int(start[b, g]))
                tokens[b, g], positions[b, g], mask[b, g] = encoded.tokens, encoded.positions, encoded.mask
                following[b, g] = encoded.next_position
        return tokens, positions, mask, following

    def _keyframes(self, prompts: Sequence[Prompt], turns: list[list[Turn1 | None]]) -> tuple[np.ndarray, np.ndarray]:
        """`keyframes` and `keyframe_index` of a RolloutBatch; each frame is decoded once however many chose it."""
        side = self.encoder.chain.keyframe_size
        images = np.zeros((len(prompts), len(turns[0]), side, side, 3), np.uint8)
        index = np.full(images.shape[:2], -1, np.int32)
        jpegs = {}  # by the prompt and the slot of the image
        for b, (prompt, row) in enumerate(zip(prompts, turns, strict=True)):
            chosen = list(dict.fromkeys(turn.frame_idx for turn in row if turn is not None))
            jpegs |= {(b, slot): prompt.jpegs[frame] for slot, frame in enumerate(chosen)}
            index[b] = [chosen.index(turn.frame_idx) if turn is not None else -1 for turn in row]
        with ThreadPoolExecutor(cores()) as pool:  # the devices wait for them, and Pillow lets go of the GIL
            for place, image in zip(jpegs, pool.map(partial(decode_square, size=side), jpegs.values()), strict=True):
                images[place] = image
        return images, index


def _three(positions: np.ndarray) -> np.ndarray:
    """[B, G, L] positions of text tokens as [B, G, 3, L]: all three axes agree."""
    return np.repeat(positions[:, :, None], 3, axis=2)


def _ended(tokens: np.ndarray, real: np.ndarray, end_token: int) -> np.ndarray:
    return ((tokens == end_token) & real).any(-1)


def _unfinished(kind: type[Turn1] | type[Turn2]) -> Any:
    """The parse of an answer that was cut off by its limit: a failure, whatever it holds."""
    empty = {Turn1: {"frame_idx": None, "description": ""}, Turn2: {"box": None}}[kind]
    return kind(ok=False, format_score=0.0, reason="the answer reached the token limit", **empty)


@partial(jax.jit, static_argnums=(0, 1))
def _cast(dtype: jnp.dtype, shardings: tuple[NamedSharding, ...], arrays: list[jax.Array]) -> list[jax.Array]:
    return [
        jax.lax.with_sharding_constraint(array.astype(dtype), sharding)
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def read_prefix(graphdef, params, frames, tokens, positions, mask) -> PrefixCache:
    policy = nnx.merge(graphdef, *params)
    cache = policy.prefill(PrefixTokens(tokens, jnp.moveaxis(positions, 1, 0), mask, policy.encode(frames))).cache()
    return cache._replace(key=_cached(policy, cache.key), value=_cached(policy, cache.value))


def _cached(policy: Policy, array: jax.Array) -> jax.Array:
    """Keys or values [layers, B, key heads, ...] where caches live."""
    return constrain(policy.placement, array, None, "prompts", "key_heads")


def _answer(policy: Policy, parts) -> tuple[jax.Array, ...]:
    return tuple(constrain(policy.placement, part, "prompts") for part in parts)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def answer_turn1(graphdef, limit, slots, sampling, params, prefix, token, position, alive, keys):
    """The first answers, and the suffix cache of `slots` slots with them in it."""
    policy, keys = nnx.merge(graphdef, *params), jax.random.wrap_key_data(keys)
    # Every token reads the whole cache: no slots yet for what comes later.
    cache = empty_suffix_cache(policy.config.text, *token.shape, 1 + limit, prefix.key.dtype)
    cache = cache._replace(key=_cached(policy, cache.key), value=_cached(policy, cache.value))
    *answer, cache = decode_answer(policy, prefix, cache, token, position, alive, keys, 0, limit, sampling)
    return _answer(policy, answer), cache.widened(slots)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def read_turn2(
    graphdef, slot, params, prefix, cache, tokens, positions, mask, keyframes, keyframe_index
) -> SuffixCache:
    """Reads the turn-2 prompts, all but their last token, into the suffix cache from `slot` on."""
    policy = nnx.merge(graphdef, *params)
    x = policy.embed(tokens, encode_keyframes(policy, keyframes, keyframe_index))
    rotation = decoder_rotation(policy.config.text, jnp.moveaxis(positions, 2, 0), x.dtype)
    inputs = policy.text.layer_inputs(prefix)
    return policy.text.extend(x, rotation, mask, slot, inputs, prefix.mask, cache)[1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def answer_turn2(graphdef, slot, limit, sampling, params, prefix, cache, token, position, alive, keys):
    policy, keys = nnx.merge(graphdef, *params), jax.random.wrap_key_data(keys)
    # The cache goes back so that the loop can work in the memory of the one that was given.
    *answer, cache = decode_answer(policy, prefix, cache, token, position, alive, keys, slot, limit, sampling)
    return _answer(policy, answer), cache
