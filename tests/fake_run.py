"""A run folder as training and evaluation leave it, made up in a second: real synthetic clips, invented numbers."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np

from revseg_jax.data.clip import boxes_and_areas, encode_mask
from revseg_jax.data.frames import encode_frame
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic import render
from revseg_jax.evaluation.metrics import contour_accuracy, region_similarity
from revseg_jax.rewards.spatial import spatial_reward
from revseg_jax.rewards.temporal import soft_scores

SHOWN = 8
BASE = {"j": 22.41, "f": 28.13, "jf": 25.27, "format": 0.874, "temporal": 0.468, "spatial": 0.311, "mask": 0.264,
        "turns": 1.86, "clips": 120, "by_kind": {"referring": 31.2, "motion": 20.4, "reasoning": 23.9},
        "best_constant_keyframe": 0.534, "random_visible_keyframe": 0.452, "reversed_temporal": 0.461}  # fmt: skip
TRAINED = {"j": 51.88, "f": 60.74, "jf": 56.31, "format": 0.998, "temporal": 0.783, "spatial": 0.742, "mask": 0.571,
           "turns": 2.0, "clips": 120, "by_kind": {"referring": 71.3, "motion": 45.8, "reasoning": 49.6},
           "best_constant_keyframe": 0.534, "random_visible_keyframe": 0.452, "reversed_temporal": 0.765}  # fmt: skip


def write_run(folder: Path, steps: int = 60, clips: int = 12) -> Path:
    (folder / "traces").mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text("run:\n  dir: runs/demo\n  seed: 7\n  steps: 60\n")
    write_json(folder / "run.json", {"seed": 7, "git": {"revision": "0123456789abcdef", "clean": True},
                                     "versions": {"jax": "0.10.2"}, "devices": ["TFRT_CPU_0"]})  # fmt: skip
    write_json(folder / "summary.json", {"base_jf": 25.27, "trained_jf": 56.31, "base": BASE, "trained": TRAINED,
                                         "steps": steps, "seconds": 437.2, "seed": 7})  # fmt: skip
    write_lines(folder / "metrics.jsonl", [metrics(step, steps, rng) for step in range(1, steps + 1)])
    evaluations = [{"step": 0, "label": "base", **BASE}, {"step": steps, "label": "trained", **TRAINED}]
    write_lines(folder / "evaluation.jsonl", evaluations)
    for name, skill in (("base", 0.35), ("trained", 0.65)):
        records = [chain(seed, skill, rng) for seed in range(clips)]
        write_lines(folder / "traces" / f"eval_{name}.jsonl", records)
    for step in {1, steps or 1}:
        skill = 0.35 if step == 1 else 0.7
        records = [chain(seed, skill, rng, group, step) for seed in (100, 101) for group in range(4)]
        write_lines(folder / "traces" / f"step_{step:06d}.jsonl", records)
    return folder


def metrics(step: int, steps: int, rng: np.random.Generator) -> dict:
    progress = 1 - math.exp(-3 * step / steps)

    def noisy(start: float, end: float, noise: float) -> float:
        return float(start + (end - start) * progress + noise * rng.normal())

    parts = {
        "format": min(noisy(0.85, 1.0, 0.02), 1.0),
        "temporal": noisy(0.45, 0.8, 0.06),
        "spatial": noisy(0.3, 0.75, 0.07),
        "mask": noisy(0.26, 0.58, 0.05),
    }
    return {
        "step": step,
        "time": 1763800000.0 + 6.1 * step,
        "reward/total": 0.25 * parts["format"] + 0.25 * parts["temporal"] + 0.5 * (parts["spatial"] + parts["mask"]),
        **{f"reward/{name}": value for name, value in parts.items()},
        "reward/groups_without_spread": abs(noisy(0.05, 0.2, 0.05)),
        "rollout/turns": min(noisy(1.85, 2.0, 0.02), 2.0),
        "rollout/tokens": noisy(44, 52, 1.0),
        "rollout/truncated": abs(noisy(0.08, 0.0, 0.01)),
        "rollout/padding": 0.4,
        "failures/any": abs(noisy(0.2, 0.02, 0.01)),
        "rollout/logprob_gap": abs(noisy(2e-6, 3e-6, 5e-7)),
        "learner/loss": noisy(0.0, -0.01, 0.004),
        "learner/kl": noisy(0.0, 0.09, 0.004),
        "learner/entropy": noisy(0.9, 0.4, 0.03),
        "learner/gradient_norm": noisy(1.2, 0.8, 0.2),
        "learner/clip_fraction": 0.0,
        "speed/tokens_per_second": noisy(900, 880, 20),
        "memory/host_gib": 1.6,
        "seconds/data": 0.02,
        "seconds/rollout": 31.0 if step == 1 else noisy(2.4, 2.4, 0.1),
        "seconds/reference": 0.4,
        "seconds/reward_wait": noisy(0.8, 0.7, 0.1),
        "seconds/update": 45.0 if step == 1 else noisy(1.9, 1.9, 0.1),
    }


def chain(seed: int, skill: float, rng: np.random.Generator, group: int = 0, step: int = 0) -> dict:
    """A chain on a held-out clip whose keyframe, box and masks are the better the higher the skill, 0-1."""
    scene = render(seed, "easy", "test")
    expression = scene.expressions[seed % len(scene.expressions)]
    truth = scene.masks[:, expression.target]
    total, height, width = truth.shape
    shown = sample_frames(total, SHOWN)
    boxes, areas = boxes_and_areas([encode_mask(mask) for mask in truth], height, width)
    scores = soft_scores(areas[shown])
    description = scene.objects[expression.target].description
    record = {
        "step": step, "video_id": f"test-{seed:05d}", "expression_id": str(seed % len(scene.expressions)),
        "query": expression.query, "kind": expression.kind, "group": group, "frames": total, "size": [height, width],
        "prompt1": f"<|vision_start|>{'<|video_pad|>' * 64}<|vision_end|>Question: {expression.query}",
    }  # fmt: skip
    failed = rng.random() > 0.6 + 0.5 * skill
    masks = np.zeros_like(truth)
    keyframe = int(scores.argmax()) if rng.random() < skill else int(rng.integers(len(shown)))
    frame = int(shown[keyframe])
    if failed:
        record |= {"answer1": f"<think>The {description} and the others, so", "prompt2": None, "answer2": None,
                   "keyframe": None, "frame": None, "seconds": None, "description": "", "box": None, "truth_box": None,
                   "failure": "turn 1: no object"}  # fmt: skip
        reward = {"format": 0.1, "temporal": 0.0, "spatial": 0.0, "mask": 0.0}
    else:
        found = rng.random() < skill + 0.1 and areas[frame] > 0
        box = boxes[frame] + rng.normal(size=4) * 1.5 if found else np.array([10.0, 20, 40, 55]) + rng.integers(0, 60)
        shift = (1, 1) if found else (25, -20)
        masks = np.roll(truth, shift, axis=(1, 2))
        x1, y1, x2, y2 = (int(v) for v in box)
        record |= {
            "answer1": f"<think>The clip asks for {expression.query}. Two others move as well; the {description} is "
            f"largest in frame {keyframe}.</think>\n"
            f'<answer>[{{"frame_idx": {keyframe}, "object description": "{description}"}}]</answer>',
            "prompt2": f"<|vision_start|><|image_pad|><|vision_end|>Detect '{description}'",
            "answer2": f'<answer>[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "{description}"}}]</answer>',
            "keyframe": keyframe, "frame": frame, "seconds": frame / scene.fps, "description": description,
            "box": [float(v) for v in box], "failure": "",
            "truth_box": boxes[frame].tolist() if areas[frame] > 0 else None,
        }  # fmt: skip
        j = region_similarity(masks, truth).mean()
        reward = {"format": 1.0, "temporal": float(scores[keyframe]), "mask": float(j),
                  "spatial": spatial_reward("threshold", box, boxes[frame])}  # fmt: skip
    reward["total"] = 0.25 * reward["format"] + 0.25 * reward["temporal"] + 0.5 * (reward["spatial"] + reward["mask"])
    record["reward"] = reward
    if step == 0:
        j, f = region_similarity(masks, truth), contour_accuracy(masks, truth)
        record |= {"j": float(j.mean()), "f": float(f.mean())}
        record["thumbs"] = [
            {"t": int(t), "jpeg": base64.b64encode(encode_frame(scene.frames[t])).decode(),
             "mask": rle_text(masks[t]), "truth": rle_text(truth[t])}
            for t in shown
        ]  # fmt: skip
    return record


def rle_text(mask: np.ndarray) -> dict | None:
    rle = encode_mask(mask)
    return rle and {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
