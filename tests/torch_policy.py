"""Small Qwen2.5-VL models with random sizes and weights in transformers' torch: the oracle of the policy tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from revseg_jax.policy.checkpoint import resolve_folder
from revseg_jax.policy.config import ModelConfig, read_config
from revseg_jax.policy.hf_weights import load_weights
from revseg_jax.policy.model import Policy
from revseg_jax.policy.rope import sequence_positions

torch.set_num_threads(1)

# Tiny models compile for seconds and run for milliseconds: a third of the time with less of the compiler.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later ones have no such option
quick_jit = partial(jax.jit, compiler_options=QUICK)

TEXT_TOKENS = 90  # ids below are text
VISION_START, VISION_END, IMAGE, VIDEO, VOCAB = 90, 91, 92, 93, 96


def random_model(seed: int, **overrides: object) -> Qwen2_5_VLForConditionalGeneration:
    """Float32 on the CPU, in eval mode. Weights are scaled so that activations and logits are of order 1."""
    rng = np.random.default_rng(seed)
    heads, ratio, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), int(rng.choice([8, 12, 16]))
    section = rng.multinomial(head_dim // 2 - 3, [1 / 3] * 3) + 1
    patch, side = int(rng.choice([2, 4])), int(rng.choice([2, 3]))
    depth, vision_heads = 3, int(rng.choice([1, 2, 3]))
    width = int(heads * ratio * head_dim)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": width,
            "intermediate_size": int(rng.integers(20, 60)),
            "num_hidden_layers": 2,
            "num_attention_heads": int(heads * ratio),
            "num_key_value_heads": int(heads),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(rng.choice([1e4, 1e6])),
                "mrope_section": [int(part) for part in section],
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_heads * int(rng.choice([8, 16])),
            "intermediate_size": int(rng.integers(20, 60)),
            "num_heads": vision_heads,
            "out_hidden_size": width,
            "patch_size": patch,
            "window_size": side * 2 * patch,
            "fullatt_block_indexes": [int(rng.integers(depth))],
            "tokens_per_second": int(rng.choice([2, 4, 25])),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **{"tie_word_embeddings": bool(rng.random() < 0.5), **overrides},
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise / np.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load_ours(folder: Path, dtype: str = "float32") -> Policy:
    config = read_config(folder)
    policy = nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    load_weights(folder, policy, dtype)
    return policy


@dataclass(frozen=True)
class Conversation:
    """Tokens and what stands in for their images and videos. Grids are (time, height, width) in patches."""

    tokens: np.ndarray  # int64 [length]
    grids: list[tuple[int, int, int]]  # in order of appearance
    is_video: list[bool]
    seconds: list[float]  # one temporal patch of each video
    patches: list[np.ndarray]  # float32 [time, height * width, patch_dim] each

    def torch_inputs(self) -> dict:
        return torch_batch(processor_output([self]))

    def positions(self, config: ModelConfig) -> np.ndarray:
        return sequence_positions(self.tokens, config, self.grids, self.seconds)

    def features(self, policy: Policy, encode: Callable | None = None) -> jax.Array:
        """[visual tokens, hidden]. Inside another jit `encode` must be `encode_patches`."""
        encode = encode or encode_alone
        parts = [encode(policy, patches, *grid[1:]) for patches, grid in zip(self.patches, self.grids, strict=True)]
        return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def processor_output(talks: list[Conversation], side: str = "right") -> dict[str, np.ndarray]:
    """What transformers' processor returns for a batch, with padding on the given side. NumPy, as a user passes it."""
    length = max(len(talk.tokens) for talk in talks)
    tokens, mask = np.zeros((2, len(talks), length), np.int64)
    for row, talk in enumerate(talks):
        here = slice(length - len(talk.tokens), None) if side == "left" else slice(len(talk.tokens))
        tokens[row, here], mask[row, here] = talk.tokens, 1
    output = {"input_ids": tokens, "attention_mask": mask}
    output["mm_token_type_ids"] = ((tokens == IMAGE) * 1 + (tokens == VIDEO) * 2).astype(np.int32)
    for video, grid_name, pixels_name in (
        (False, "image_grid_thw", "pixel_values"),
        (True, "video_grid_thw", "pixel_values_videos"),
    ):
        mine = [
            (grid, patches.reshape(-1, patches.shape[-1]))
            for talk in talks
            for grid, patches, is_video in zip(talk.grids, talk.patches, talk.is_video, strict=True)
            if is_video == video
        ]
        if mine:
            output[grid_name] = np.array([grid for grid, _ in mine])
            output[pixels_name] = np.concatenate([patches for _, patches in mine])
    if any(talk.seconds for talk in talks):
        output["second_per_grid_ts"] = np.array([second for talk in talks for second in talk.seconds], np.float32)
    return output


def torch_batch(output: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in output.items()}


def save_policy_folder(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> Path:
    """A folder that `load_policy` takes: weights and config as transformers writes them, and the embedded tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_folder("embedded") / name, folder)
    return folder


def encode_patches(policy: Policy, patches: np.ndarray, height: int, width: int) -> jax.Array:
    return policy.vision(jnp.asarray(patches, policy.dtype), height, width)


encode_alone = quick_jit(encode_patches, static_argnums=(2, 3))


def conversation(rng: np.random.Generator, config: ModelConfig, *pieces: int | tuple[int, int, int]) -> Conversation:
    """An int is that many text tokens, (0, height, width) an image and (time, height, width) a video."""
    tokens, grids, is_video, seconds, patches = [], [], [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += rng.integers(0, TEXT_TOKENS, piece).tolist()
            continue
        video, grid = piece[0] > 0, (max(piece[0], 1), *piece[1:])
        count = grid[0] * grid[1] * grid[2] // config.vision.spatial_merge_size**2
        tokens += [VISION_START] + [VIDEO if video else IMAGE] * count + [VISION_END]
        grids.append(grid)
        is_video.append(video)
        seconds += [float(rng.choice([0.5, 1.0, 2 / 3]))] if video else []
        patches.append(rng.normal(size=(grid[0], grid[1] * grid[2], config.vision.patch_dim)).astype(np.float32))
    return Conversation(np.array(tokens), grids, is_video, seconds, patches)
