"""Where everything stands: the shared prefix of a prompt and the fixed slots of a rollout's suffix.

    prefix   system, video, query                          P slots, padded on the right
    suffix   slot 0                                        the last token of the turn-1 prompt
             turn1 slots                                   first answer, padded on the right
             turn-2 prompt slots                           padded on the LEFT: the second answer follows it directly
             turn2 slots                                   second answer, padded on the right

A chain of one turn has no slots behind the first answer.

Slot 0 belongs to the suffix so that every sampled token is predicted by the hidden state of the suffix slot before it,
and the prefix needs no head. Masks hide the padding; rotary positions are those of the conversation without any.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from revseg_jax.chain.prompts import DESCRIPTION_LIMIT, one_line, prefix_text, turn2_prompt_text
from revseg_jax.config import ChainConfig
from revseg_jax.errors import InputError
from revseg_jax.policy.config import ModelConfig
from revseg_jax.policy.rope import sequence_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SlotLayout:
    """Sizes in tokens, fixed for a run."""

    prefix: int
    turn1: int
    turn2_prompt: int
    turn2: int

    @property
    def turn2_prompt_start(self) -> int:
        return 1 + self.turn1

    @property
    def turn2_start(self) -> int:
        return self.turn2_prompt_start + self.turn2_prompt

    @property
    def suffix(self) -> int:
        return self.turn2_start + self.turn2

    @property
    def sampled(self) -> np.ndarray:
        """The suffix slots that hold answers: int [turn1 + turn2]."""
        return np.r_[1 : self.turn2_prompt_start, self.turn2_start : self.suffix]

    @property
    def turns(self) -> np.ndarray:
        """The turn, 0 or 1, of every suffix slot: int [S]."""
        return (np.arange(self.suffix) >= self.turn2_prompt_start).astype(int)


@dataclass(frozen=True)
class EncodedPrefix:
    """One prompt's prefix: tokens int32 [P], positions int32 [3, P], mask bool [P]; and slot 0 of its suffixes."""

    tokens: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    last_token: int
    last_position: int


@dataclass(frozen=True)
class EncodedTurn2:
    """A turn-2 prompt in its slots: tokens int32 [Q], positions int32 [3, Q], mask bool [Q]; the answer starts at
    position `next_position`."""

    tokens: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    next_position: int


def slot_layout(model: ModelConfig, chain: ChainConfig) -> SlotLayout:
    """Raises InputError when an image cannot be cut into whole tokens."""
    step = model.vision.merged_patch_size
    for name, size in (("frame_size", chain.frame_size), ("keyframe_size", chain.keyframe_size)):
        if size % step:
            raise InputError(f"chain.{name}={size} must be a multiple of {step}, the pixels one token covers")
    video = chain.frames // model.vision.temporal_patch_size * (chain.frame_size // step) ** 2
    second = chain.turns == 2
    return SlotLayout(
        prefix=video + chain.query_tokens,
        turn1=chain.turn1_tokens,
        turn2_prompt=(chain.keyframe_size // step) ** 2 + chain.turn2_prompt_tokens if second else 0,
        turn2=chain.turn2_tokens if second else 0,
    )


@dataclass(frozen=True)
class PromptEncoder:
    """Writes prompts into slots with a checkpoint's tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    model: ModelConfig
    chain: ChainConfig

    def __post_init__(self) -> None:
        for name, token in (("<|image_pad|>", self.model.image_token_id), ("<|video_pad|>", self.model.video_token_id)):
            if (found := self.tokenizer.convert_tokens_to_ids(name)) != token:
                raise InputError(
                    f"the tokenizer's {name} is {found} and config.json's {token}: they are of different policies, and "
                    "this one would see no frames"
                )
        if len(self.tokenizer) > self.model.text.vocab_size:
            raise InputError(
                f"the tokenizer has {len(self.tokenizer)} tokens and config.json a vocab_size of "
                f"{self.model.text.vocab_size}: they are of different policies"
            )
        slot_layout(self.model, self.chain)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one temporal patch of the video."""
        return (self.chain.frame_size // self.model.vision.merged_patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        return (self.chain.keyframe_size // self.model.vision.merged_patch_size) ** 2

    @property
    def layout(self) -> SlotLayout:
        return slot_layout(self.model, self.chain)

    def prefix(self, query: str, frames: int, seconds: float) -> EncodedPrefix:
        """The prompt of turn 1 about a video of which `frames` frames are shown."""
        vision = self.model.vision
        steps = -(-frames // vision.temporal_patch_size)
        side = self.chain.frame_size // vision.patch_size
        text = self.turn1_prompt(query, frames, seconds)
        if text != prefix_text(self.chain, query, frames, seconds):
            _warn_once(
                f"chain.query_tokens={self.chain.query_tokens}: the end of a query is left out: {query[:80]!r}..."
            )
        tokens = self._expand(text, self.model.video_token_id, steps * self.frame_tokens)
        seconds_per_grid = vision.temporal_patch_size / self.chain.fps
        positions = sequence_positions(tokens, self.model, [(steps, side, side)], [seconds_per_grid])
        padding = self.layout.prefix - (len(tokens) - 1)
        return EncodedPrefix(
            tokens=np.pad(tokens[:-1], (0, padding)),
            positions=np.pad(positions[:, :-1], ((0, 0), (0, padding))),
            mask=np.arange(self.layout.prefix) < len(tokens) - 1,
            last_token=int(tokens[-1]),
            last_position=int(positions[0, -1]),
        )

    def turn1_prompt(self, query: str, frames: int, seconds: float) -> str:
        """`prefix_text` as it is read. Of a query that does not fit the end is left out, as it comes from the data and
        must not stop a run halfway. Raises InputError when even the words around it do not fit."""
        query, slots = one_line(query), self.chain.query_tokens
        limit = len(query)
        while True:
            text = prefix_text(self.chain, query[:limit].rstrip(), frames, seconds)
            needed = len(self.tokenizer(text)["input_ids"]) - 2  # the video's placeholder, and slot 0 of the suffixes
            if needed <= slots:
                return text
            if limit == 0:
                raise InputError(f"chain.query_tokens={slots} is too small: the prompt needs {needed} without a query")
            limit = max(0, limit - (needed - slots))  # a token has a character or several

    def turn2_prompt(self, description: str) -> str:
        """`turn2_prompt_text` as it is read. A description that does not fit is cut: it comes from the policy and must
        never stop a run. Raises InputError when even the words around it do not fit."""
        slots, limit = self.chain.turn2_prompt_tokens, DESCRIPTION_LIMIT
        while True:
            text = turn2_prompt_text(self.chain, description, limit)
            needed = len(self.tokenizer(text)["input_ids"]) - 1  # the image's placeholder
            if needed <= slots:
                return text
            if limit == 0:
                raise InputError(
                    f"chain.turn2_prompt_tokens={slots} is too small: the turn-2 prompt needs {needed} without any "
                    "description"
                )
            limit = min(limit, len(description)) // 2

    def turn2(self, description: str, start: int) -> EncodedTurn2:
        """The prompt of turn 2 with its first token at position `start`."""
        slots, text = self.layout.turn2_prompt, self.turn2_prompt(description)
        tokens = self._expand(text, self.model.image_token_id, self.image_tokens)
        side = self.chain.keyframe_size // self.model.vision.patch_size
        positions = start + sequence_positions(tokens, self.model, [(1, side, side)], [])
        padding = slots - len(tokens)
        return EncodedTurn2(
            tokens=np.pad(tokens, (padding, 0)),
            positions=np.pad(positions, ((0, 0), (padding, 0))),
            mask=np.arange(slots) >= padding,
            next_position=int(positions[0, -1]) + 1,
        )

    def _expand(self, text: str, token: int, count: int) -> np.ndarray:
        """Token ids int32 of a text whose one vision placeholder `token` stands for `count` visual tokens."""
        ids = np.asarray(self.tokenizer(text)["input_ids"], np.int32)
        return np.repeat(ids, np.where(ids == token, count, 1))


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    print(f"revseg: warning: {message}", file=sys.stderr)
