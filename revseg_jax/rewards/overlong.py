"""What an answer loses for coming close to its token limit."""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: float) -> float:
    """0 for up to limit - buffer tokens, from there linearly down to -1 at the limit (DAPO, arXiv 2503.14476, equation
    13), where an answer is cut off. Always 0 when `buffer` is 0."""
    return -max(0.0, min(1.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0
