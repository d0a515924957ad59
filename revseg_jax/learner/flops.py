"""Model FLOPs of an update, counted from sizes: what the arithmetic needs, whatever a program really does."""

from __future__ import annotations

import re

import numpy as np

from revseg_jax.config import LearnerConfig
from revseg_jax.policy.config import ModelConfig, TextConfig, VisionConfig
from revseg_jax.rollout.batch import RolloutBatch

# Peak FLOP/s of one device in bfloat16 without sparsity, by a part of JAX's name for it that no digit follows; from the
# makers' data sheets. The first that fits counts.
PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),  # a chip is two devices
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Of one device; None for a CPU and whatever else is not in the table."""
    return next((peak for name, peak in PEAKS if re.search(rf"{name}(?!\d)", device_kind)), None)


def update_flops(model: ModelConfig, config: LearnerConfig, batch: RolloutBatch) -> float:
    """FLOPs of all passes of a training step over its rollouts, padding left out.

    A backward pass takes twice the forward pass; recomputation is not counted (as in PaLM's model FLOPs utilisation,
    arXiv 2204.02311, appendix B). batch: arrays on the host.
    """
    vision, text = forward_flops(model, batch)
    once = vision * (1 if config.freeze_vision else 3) + text * 3
    critics = 2 if config.algorithm == "ppo" and config.ppo.critic == "trunk" else 1
    return once * critics * config.epochs


def forward_flops(model: ModelConfig, batch: RolloutBatch) -> tuple[float, float]:
    """(vision tower, decoder) of one pass: each video, prefix and different keyframe once a prompt."""
    prompts, frames, side = batch.frames.shape[:3]
    keyframes = int((np.asarray(batch.keyframe_index).max(axis=1) + 1).sum())
    slices = prompts * frames // model.vision.temporal_patch_size
    vision = slices * _slice_flops(model.vision, side) + keyframes * _slice_flops(
        model.vision, batch.keyframes.shape[2]
    )

    prefix, suffix = np.asarray(batch.prefix_mask).sum(-1), np.asarray(batch.mask).sum(-1)  # [B], [B, G]
    tokens = float(prefix.sum() + suffix.sum())
    pairs = (prefix**2 / 2).sum() + (suffix * prefix[:, None] + suffix**2 / 2).sum()
    text = 2 * tokens * _layers_size(model.text) + pairs * _pair_flops(model.text)
    text += 2 * float(np.asarray(batch.generated).sum()) * model.text.hidden_size * model.text.vocab_size
    return vision, float(text)


def _layers_size(text: TextConfig) -> int:
    """Weights of all matrices of the decoder layers."""
    attention = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    return text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def _pair_flops(text: TextConfig) -> int:
    """Of one query and one key in all layers: their product and the weighted value."""
    return 4 * text.num_layers * text.num_heads * text.head_dim


def _slice_flops(vision: VisionConfig, side: int) -> float:
    """One temporal slice of square frames with `side` pixels through the tower."""
    width, patches = vision.hidden_size, (side // vision.patch_size) ** 2
    window = min((vision.window_side * vision.spatial_merge_size) ** 2, patches)
    full = len(vision.fullatt_block_indexes)
    matrices = vision.depth * (4 * width**2 + 3 * width * vision.intermediate_size) + vision.patch_dim * width
    pairs = patches * (full * patches + (vision.depth - full) * window)
    merged = width * vision.spatial_merge_size**2
    merger = patches / vision.spatial_merge_size**2 * (merged**2 + merged * vision.out_hidden_size)
    return 2 * (patches * matrices + merger) + 4 * width * pairs
