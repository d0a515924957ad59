"""Does a policy know which object a query means? A choice among the names of the objects in the scene."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revseg_jax.data.frames import resize_square
from revseg_jax.policy.model import Policy, chunked_logprobs
from revseg_jax.pretraining.examples import ExampleMaker
from revseg_jax.pretraining.primitives import Conversation, Turn

SLOTS, BATCH = 64, 32  # tokens of a question with its answer; questions scored at once


def naming_accuracy(policy: Policy, maker: ExampleMaker, clips: int, blank: bool = False) -> dict[str, float]:
    """Share of right answers to "What is meant by ...?" for each kind of query, over `clips` clips of the maker's seed.

    The answer counts as the name that the policy finds the likeliest of those in the scene, all of three objects (or as
    many as the difficulty has): guessing gives one over their number. blank: the frames are shown as plain grey.
    """
    maker = replace(maker, suffixes=(0, 0, 0, 1), slots=SLOTS)
    frames, packed, targets, kinds = [], [], [], []
    for index in range(clips):
        seen = maker.draw_view(np.random.default_rng([maker.seed, index]))
        shown = np.stack([resize_square(seen.scene.frames[t], maker.chain.frame_size) for t in seen.sampled])
        for expression in seen.scene.expressions:
            question = f"What is meant by {expression.query!r}?"
            frames.append(np.full_like(shown, 128) if blank else shown)
            packed.append([maker.pack(Conversation((Turn(question, name),))) for name in seen.names])
            targets.append(expression.target)
            kinds.append(expression.kind)
    graphdef, params = nnx.split(policy)

    @jax.jit
    def score(params, frames, tokens, positions, mask, trained):
        """[B, choices]: the logarithm of each name's probability."""
        policy, count = nnx.merge(graphdef, params), len(frames)
        length, prefix = len(maker.prefix_tokens), jnp.asarray(maker.prefix_tokens)
        cache = policy.prefill(
            jnp.broadcast_to(prefix, (count, length)),
            jnp.broadcast_to(jnp.asarray(maker.prefix_positions)[:, None], (3, count, length)),
            jnp.ones((count, length), bool),
            policy.encode(frames),
        )
        visible = jnp.tril(jnp.ones((SLOTS, SLOTS), bool)) & mask[:, :, None, :]
        hidden, _, _ = policy.text(
            policy.text.embed(tokens, policy.dtype), jnp.moveaxis(positions, 2, 0), visible, cache
        )
        logprobs, _ = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], 2048)
        return (logprobs * (trained[:, :, 1:] > 0)).sum(-1)

    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(targets), BATCH):
        rows = [min(i, len(targets) - 1) for i in range(start, start + BATCH)]  # the last batch is filled up
        arrays = [
            np.stack([[choice[name] for choice in packed[i]] for i in rows])
            for name in ("tokens", "positions", "mask", "trained")
        ]
        scores = np.asarray(score(params, np.stack([frames[i] for i in rows]), *arrays))
        for i, row in zip(rows[: len(targets) - start], scores, strict=False):
            right[kinds[i]].append(row.argmax() == targets[i])
    return {kind: float(np.mean(answers)) for kind, answers in sorted(right.items())}
