"""What a policy knows, asked as choices: which object does a query mean, in which frame is an object biggest?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revseg_jax.data.frames import resize_square
from revseg_jax.policy.model import Policy, PrefixTokens, chunked_logprobs
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.primitives import Conversation, Turn, View, biggest_turn, keyframe_answer

NAMING_SLOTS, BIGGEST_SLOTS = 64, 96  # tokens of a question with its answer
BATCH = 32  # questions scored at once


@dataclass(frozen=True)
class Choice:
    """A question about a clip, the answers it may have (equally many in all questions) and which of them are right."""

    kind: str
    clip: int
    question: str
    answers: Sequence[str]
    right: Sequence[bool]


def naming_accuracy(policy: Policy, maker: ExampleMaker, clips: int, blank: bool = False) -> dict[str, float]:
    """Share of right answers to "What is meant by ...?" for each kind of query, over `clips` clips of the maker's seed.

    The answer counts as the name that the policy finds the likeliest of those in the scene, all of three objects (or as
    many as the difficulty has): guessing gives one over their number. blank: the frames are shown as plain grey.
    """
    maker = replace(maker, suffixes=(0, 0, 0, 1), slots=NAMING_SLOTS)
    views = _views(maker, clips)
    choices = [
        Choice(
            expression.kind,
            clip,
            f"What is meant by {expression.query!r}?",
            seen.names,
            [k == expression.target for k in range(len(seen.names))],
        )
        for clip, seen in enumerate(views)
        for expression in seen.scene.expressions
    ]
    return share_right(policy, maker, views, choices, blank)


def biggest_accuracy(policy: Policy, maker: ExampleMaker, clips: int) -> float:
    """Share of right answers to "In which frame is the ... biggest?" over `clips` clips of the maker's seed.

    The answer counts as the frame that the policy finds the likeliest after it was given the object's true sizes as its
    own thoughts. Guessing gives one over the number of frames, a little more where sizes are equal.
    """
    maker = replace(maker, suffixes=(0, 0, 1, 0), slots=BIGGEST_SLOTS)
    views = _views(maker, clips)
    choices = [
        Choice("biggest", clip, *_biggest(maker, seen, k))
        for clip, seen in enumerate(views)
        for k in np.flatnonzero(seen.visible.any(0))
    ]
    return share_right(policy, maker, views, choices)["biggest"]


def _biggest(maker: ExampleMaker, seen: View, k: int) -> tuple[str, list[str], list[bool]]:
    question, areas = biggest_turn(seen, maker.chain, k).user, seen.areas[:, k]
    answers = [keyframe_answer(seen, maker.chain, k, frame) for frame in range(len(areas))]
    return question, answers, (areas == areas.max()).tolist()


def _views(maker: ExampleMaker, clips: int) -> list[View]:
    return [maker.draw_view(np.random.default_rng([maker.seed, clip])) for clip in range(clips)]


def share_right(
    policy: Policy, maker: ExampleMaker, views: Sequence[View], choices: Sequence[Choice], blank: bool = False
) -> dict[str, float]:
    """For each kind, how often the likeliest of the answers is a right one. views: the clips that are asked about."""
    graphdef, params = nnx.split(policy)

    @jax.jit
    def score(params, frames, tokens, positions, mask, trained):
        """[B, choices]: the logarithm of each answer's probability."""
        policy, count = nnx.merge(graphdef, params), len(frames)
        length, prefix = len(maker.prefix_tokens), jnp.asarray(maker.prefix_tokens)
        before = PrefixTokens(
            jnp.broadcast_to(prefix, (count, length)),
            jnp.broadcast_to(jnp.asarray(maker.prefix_positions)[:, None], (3, count, length)),
            jnp.ones((count, length), bool),
            policy.encode(frames),
        )
        hidden = policy.suffix_hidden(before, tokens, jnp.moveaxis(positions, 2, 0), mask)
        logprobs, _ = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], 2048)
        return (logprobs * (trained[:, :, 1:] > 0)).sum(-1)

    shown = [_frames(maker, seen, blank) for seen in views]
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(choices), BATCH):
        batch = choices[start : start + BATCH]
        filled = [*batch, *batch[:1] * (BATCH - len(batch))]  # the last one: the same program scores all
        frames = np.stack([shown[choice.clip] for choice in filled])
        scores = np.asarray(score(params, frames, *_pack(maker, filled)))
        for choice, row in zip(batch, scores, strict=False):
            right[choice.kind].append(choice.right[row.argmax()])
    return {kind: float(np.mean(answers)) for kind, answers in sorted(right.items())}


def _frames(maker: ExampleMaker, seen: View, blank: bool) -> np.ndarray:
    """uint8 [N, S, S, 3]"""
    shown = np.stack([resize_square(seen.scene.frames[t], maker.chain.frame_size) for t in seen.sampled])
    return np.full_like(shown, 128) if blank else shown


def _pack(maker: ExampleMaker, choices: Sequence[Choice]) -> list[np.ndarray]:
    """tokens [B, choices, slots], positions [B, choices, 3, slots], mask and trained [B, choices, slots]"""
    packed = [
        [maker.pack(Conversation((Turn(choice.question, answer),))) for answer in choice.answers] for choice in choices
    ]
    return [
        np.array([[answer[name] for answer in row] for row in packed])
        for name in ("tokens", "positions", "mask", "trained")
    ]
