"""Qwen2.5-VL in Flax NNX: published checkpoints in, logits out, published layout back."""

from revseg_jax.policy.checkpoint import LoadedPolicy, load_policy

__all__ = ["LoadedPolicy", "load_policy"]
