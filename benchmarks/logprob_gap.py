"""How far sampler and learner are apart in the log-probabilities of sampled tokens, and what float32 allows.

    python benchmarks/logprob_gap.py [--prompts 64] [--seed 0] [--out logprob_gap.json]

The embedded policy samples 8 two-turn chains for each of `prompts` pairs of synthetic clip and query (temperature 1).
Every sampled token is then scored in five ways: as the sampler saw it, by the learner, and by transformers' torch model
of the same weights, which reads the whole sequence at once or goes through a cache token by token, as `generate` does,
in float32, and the whole sequence in float64. The last one stands for the truth, though transformers keeps its rotary
tables in float32 there too: what they are rounded by counts against ours only. All normalise the pixels alike, each in
its own type. Distances are absolute, in nats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from revseg_jax.config import LearnerConfig, load_config
from revseg_jax.data.example import make_example, stack
from revseg_jax.data.source import ClipSource
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.learner.update import make_learner
from revseg_jax.policy.config import VisionConfig
from revseg_jax.policy.preprocess import patchify
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.loading import LoadedEngine, load_engine, prompts_of
from revseg_jax.rollout.sampling import rollout_keys

CONFIG = Path(__file__).parents[1] / "configs/demo.yaml"
GROUP = 8
PAIRS = {
    "sampler and learner": ("sampler", "learner"),
    "torch whole and cached": ("torch whole", "torch cached"),
    "sampler and float64": ("sampler", "float64"),
    "learner and float64": ("learner", "float64"),
    "torch whole and float64": ("torch whole", "float64"),
    "torch cached and float64": ("torch cached", "float64"),
}


def sample(loaded: LoadedEngine, prompts: int, seed: int) -> RolloutBatch:
    """Chains about the first pairs of clip and query of a synthetic set."""
    chain = load_config(CONFIG).chain
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder, "clips")
        prepare_synthetic(clips, "easy", prompts, 1, seed)
        source = ClipSource([clips], "train")
        batch = stack([make_example(source[i], i, chain) for i in range(prompts)])
    keys = rollout_keys(seed, 0, batch.index, GROUP)
    return loaded.engine.sample((loaded.trained, loaded.frozen), prompts_of(batch), keys)[0]


def patches_of(frames: np.ndarray, config: VisionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, side, side, 3] -> what transformers takes: patches [patches, patch_dim] and their grid [1, 3]."""
    frames = np.repeat(frames, config.temporal_patch_size, axis=0) if len(frames) == 1 else frames
    with jax.enable_x64(True):
        ours = jnp.dtype(str(dtype).removeprefix("torch."))
        patches = np.array(jax.jit(patchify, static_argnums=(1, 2))(frames[None], config, ours)[0])
    side = frames.shape[1] // config.patch_size
    return torch.tensor(patches.reshape(-1, patches.shape[-1])), torch.tensor([[len(patches), side, side]])


def torch_logprobs(
    model: Qwen2_5_VLForConditionalGeneration, batch: RolloutBatch, b: int, g: int, vision: VisionConfig, cached: bool
) -> np.ndarray:
    """float64 [S]: of the sampled tokens of one rollout, each given all before it; 0 in the other slots."""
    real, prefix = batch.mask[b, g], batch.prefix_mask[b]
    tokens = torch.tensor(np.concatenate([batch.prefix_tokens[b][prefix], batch.tokens[b, g][real]])).long()
    places = np.concatenate([batch.prefix_positions[b][:, prefix], batch.positions[b, g][:, real]], axis=1)
    positions = torch.tensor(places)[:, None].long()
    sampled = np.concatenate([np.zeros(prefix.sum(), bool), batch.generated[b, g][real]])

    x = model.get_input_embeddings()(tokens)
    patches, grid = patches_of(batch.frames[b], vision, x.dtype)
    features = model.model.get_video_features(patches, grid).pooler_output
    x[tokens == model.config.video_token_id] = torch.cat(list(features))
    if (keyframe := batch.keyframe_index[b, g]) >= 0:
        patches, grid = patches_of(batch.keyframes[b, keyframe][None], vision, x.dtype)
        features = model.model.get_image_features(patches, grid).pooler_output
        x[tokens == model.config.image_token_id] = torch.cat(list(features))

    # What the model has not sampled it reads at once, up to the token from which the next one is sampled.
    ends = [*np.flatnonzero(sampled), len(tokens)] if cached else [len(tokens)]
    cache, hidden = DynamicCache(config=model.config), []
    for start, end in zip([0, *ends], ends, strict=False):
        part = {"inputs_embeds": x[None, start:end], "position_ids": positions[:, :, start:end]}
        hidden.append(model.model.language_model(**part, past_key_values=cache, use_cache=True).last_hidden_state[0])
    before = torch.cat(hidden)[np.flatnonzero(sampled) - 1]
    logprobs = torch.log_softmax(model.lm_head(before), -1)
    slots = np.zeros(real.shape)
    slots[batch.generated[b, g]] = logprobs.gather(1, tokens[sampled][:, None])[:, 0].double().numpy()
    return slots


def measure(prompts: int, seed: int) -> dict:
    loaded = load_engine(load_config(CONFIG))
    batch = sample(loaded, prompts, seed)
    encoder = loaded.engine.encoder
    learner = make_learner(loaded.engine.graphdef, LearnerConfig(), encoder.layout)
    scores = {
        "sampler": batch.logprobs,
        "learner": np.asarray(learner.logprobs(loaded.trained, loaded.frozen, batch)),
    }
    for name, dtype, cached in (
        ("torch whole", torch.float32, False),
        ("torch cached", torch.float32, True),
        ("float64", torch.float64, False),
    ):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(loaded.folder, dtype=dtype).eval()
        score = partial(torch_logprobs, model, batch, vision=encoder.model.vision, cached=cached)
        with torch.no_grad():
            rows = [score(b, g) for b, g in np.ndindex(*batch.generated.shape[:2])]
        scores[name] = np.reshape(rows, batch.generated.shape)
    gaps = {name: np.abs(scores[a] - scores[b])[batch.generated] for name, (a, b) in PAIRS.items()}
    distances = {
        name: {"mean": gap.mean(), "p99": np.quantile(gap, 0.99), "above 1e-5": (gap > 1e-5).mean(), "max": gap.max()}
        for name, gap in gaps.items()
    }
    return {
        "tokens": int(batch.generated.sum()),
        "distances": {name: {key: float(value) for key, value in row.items()} for name, row in distances.items()},
        "prompts": prompts,
        "seed": seed,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: two threads wait for each other
    text = json.dumps(measure(arguments.prompts, arguments.seed), indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
