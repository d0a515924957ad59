"""Answers of a policy that does everything right."""

from __future__ import annotations

import json


def good1(frame: int = 3, description: str = "a red circle", thought: str = "it is largest there") -> str:
    item = json.dumps([{"frame_idx": frame, "object description": description}])
    return f"<think>{thought}</think>\n<answer>{item}</answer>"


def good2(box: str = "[10, 20, 110, 220]") -> str:
    return f'<answer>[{{"bbox_2d": {box}, "label": "circle"}}]</answer>'
