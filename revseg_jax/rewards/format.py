"""r_f: how far a chain's answers follow the format."""

from __future__ import annotations

from revseg_jax.chain.parsing import Turn1, Turn2


def format_reward(turn1: Turn1, turn2: Turn2 | None) -> float:
    """Mean of the two turns' format scores (see `chain.parsing`); a turn that never took place scores 0."""
    return (turn1.format_score + (turn2.format_score if turn2 else 0.0)) / 2
