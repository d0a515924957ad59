"""r_m: how well the tracker's masks, started from the chain's keyframe and box, cover the object in the whole clip."""

from __future__ import annotations


def mask_reward(kind: str, j: float, f: float = 0.0) -> float:
    """kind j: mean J over the frames; kind jf: mean of J and F. Both inputs are means over the clip's frames."""
    if kind not in ("j", "jf"):
        raise ValueError(f"unknown mask reward {kind!r}")
    return float(j) if kind == "j" else (float(j) + float(f)) / 2
