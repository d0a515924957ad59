"""COCO's compressed run lengths of a mask, from files and from the network alike."""

from __future__ import annotations

import numpy as np


def run_lengths(counts: bytes) -> np.ndarray:
    """int64 [n] of COCO's compressed form, zeros first. The COCO API itself reads beyond the end of damaged ones.

    Runs are numbers of base 32, lowest digit first, 32 marking all digits but the last, 16 of the last the sign; from
    the fourth on they stand as differences to the run two before (rleFrString of the COCO API). Raises ValueError.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not digits.size or digits.min() < 0 or digits.max() > 63 or not ends.size or ends[-1] != digits.size - 1:
        raise ValueError("not in COCO's compressed form")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 7:
        raise ValueError("a run of more than 35 bits")
    place = np.arange(digits.size) - np.repeat(starts, sizes)
    runs = np.add.reduceat((digits & 31) << 5 * place, starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << 5 * sizes, 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs
