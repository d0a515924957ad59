"""What a group of rollouts said, on the host: texts, parsed answers, boxes."""

from __future__ import annotations

from dataclasses import dataclass

from revseg_jax.chain.geometry import Box
from revseg_jax.chain.parsing import Turn1, Turn2


@dataclass(frozen=True)
class Rollout:
    """One chain.

    Attributes:
      answer1, answer2: the sampled texts without the end token; answer2 is None when there was no second turn: turn 1
        failed, or the chain has one turn
      turn1, turn2: what was parsed from them, from the first alone in a chain of one turn; turn2 is None when turn 1
        failed
      box: the second answer's box in pixels of the ORIGINAL frame, clipped to it; None when there is none
      truncated: an answer reached its token limit without ending
      tokens1, tokens2: how many were sampled in each turn, the end token included
    """

    answer1: str
    answer2: str | None
    turn1: Turn1
    turn2: Turn2 | None
    box: Box | None
    truncated: bool
    tokens1: int
    tokens2: int = 0

    @property
    def tokens(self) -> int:
        return self.tokens1 + self.tokens2

    @property
    def ok(self) -> bool:
        """Both turns succeeded: there is a keyframe (an index into the shown frames) and a box to track from."""
        return self.box is not None

    @property
    def failure(self) -> str:
        """Why there is no box; empty when there is one."""
        if self.ok:
            return ""
        if not self.turn1.ok:
            return f"turn 1: {self.turn1.reason}"
        return f"turn {1 if self.turn2.in_first else 2}: {self.turn2.reason or 'the box covers nothing of the image'}"
