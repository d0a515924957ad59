"""Sampling of a group against google-tunix's own sampler, on a text-only model of the same shape and weights.

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7 torch torchvision
    tunix/bin/pip install --no-deps .
    tunix/bin/python benchmarks/rl_tunix.py [--small] [--repeats 3] [--out rl_tunix.json]

An environment of its own: tunix wants an older safetensors, and so an older transformers, than we. `group` rows of
`prefix` text tokens are answered by `answer` sampled tokens each, in float32 on this machine: once as so many prompts
of one rollout (G = 1), once as one prompt of so many (G = `group`); tunix has no notion of a group and gets the prompt
as often. Decode tokens a second are those of the steps after the first, so neither prefill nor what happens once a call
counts: the time of a whole rollout less that of a rollout of one token. The sides take turns in one process; every
repeat is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rl import SIZES, SMALL, Ours, timed, torch_model
from tunix import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2

SEED = 0


def tunix_model(model) -> Qwen2:
    """tunix's Qwen2 with the weights of transformers' text model."""
    text = model.config.text_config
    heads, size = text.num_attention_heads, text.hidden_size
    config = ModelConfig(
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        embed_dim=size,
        hidden_dim=text.intermediate_size,
        num_heads=heads,
        head_dim=size // heads,
        num_kv_heads=text.num_key_value_heads,
        rope_theta=int(text.rope_parameters["rope_theta"]),
        norm_eps=text.rms_norm_eps,
        use_tied_embedding=True,
    )
    theirs, weights = Qwen2(config, rngs=nnx.Rngs(0)), model.model.language_model.state_dict()

    def put(parameter, name: str, split: int = 0, heads_first: bool = False) -> None:
        """split: the number of heads that are a dimension of their own there. Matrices are transposed."""
        value = weights[name].float().numpy()
        value = value.T if value.ndim == 2 and name != "embed_tokens.weight" else value
        if split:
            value = value.reshape((split, -1, size) if heads_first else (size, split, -1))
        assert value.shape == parameter[...].shape, name
        parameter[...] = jnp.asarray(value)

    put(theirs.embedder.input_embedding, "embed_tokens.weight")
    put(theirs.final_norm.w, "norm.weight")
    for index, layer in enumerate(theirs.layers):
        name = f"layers.{index}"
        for kind, split in (("q", heads), ("k", text.num_key_value_heads), ("v", text.num_key_value_heads)):
            put(getattr(layer.attn, f"{kind}_proj").w, f"{name}.self_attn.{kind}_proj.weight", split)
            put(getattr(layer.attn, f"{kind}_bias"), f"{name}.self_attn.{kind}_proj.bias")
        put(layer.attn.o_proj.w, f"{name}.self_attn.o_proj.weight", heads, heads_first=True)
        put(layer.input_layernorm.w, f"{name}.input_layernorm.weight")
        put(layer.post_attention_layernorm.w, f"{name}.post_attention_layernorm.weight")
        for part in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, part).kernel, f"{name}.mlp.{part}.weight")
    return theirs


class Rows:
    """Stands in for a tokenizer: the "text" of a prompt is its row's number."""

    def __init__(self, prompts: np.ndarray, vocabulary: int):
        self.prompts, self.vocabulary = prompts, vocabulary

    def encode(self, text: str, **_) -> list[int]:
        return self.prompts[int(text)].tolist()

    def decode(self, ids: list[int], **_) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return self.vocabulary  # never sampled: no answer ends early

    def pad_id(self) -> int:
        return self.vocabulary


class Tunix:
    def __init__(self, model: Qwen2, prompts: np.ndarray, answer: int):
        self.config, self.answer = model.config, answer
        c, self.names = model.config, [str(row) for row in range(len(prompts))]
        cache = CacheConfig(prompts.shape[1] + answer, c.num_layers, c.num_kv_heads, c.head_dim)
        self.sampler = Sampler(model, Rows(prompts, c.vocab_size), cache)
        self.length = prompts.shape[1]

    def rollout(self, answer: int) -> np.ndarray:
        """Tokens [rows, answer]."""
        options = {"temperature": 1.0, "top_p": 1.0, "seed": SEED, "return_logprobs": True}
        out = self.sampler(self.names, answer, max_prompt_length=self.length, **options)
        return np.stack([np.asarray(tokens) for tokens in out.tokens])


def logprobs(model: Qwen2, rows: np.ndarray, answer: int) -> np.ndarray:
    """[rows, answer] of the last tokens of each row."""
    count, length = rows.shape
    positions, mask = jnp.broadcast_to(jnp.arange(length), rows.shape), jnp.tril(jnp.ones((length, length), bool))
    logits, _ = model(jnp.asarray(rows), positions, None, jnp.broadcast_to(mask, (count, length, length)))
    picked = jax.nn.log_softmax(logits[:, -answer - 1 : -1])
    return np.asarray(jnp.take_along_axis(picked, jnp.asarray(rows)[:, -answer:, None], axis=-1)[..., 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size that runs in a minute")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    sizes = SMALL if options.small else SIZES
    prefix, answer, group = sizes["prefix"], sizes["answer"], sizes["group"]
    model = torch_model(options.small)
    prompts = np.random.default_rng(0).integers(1, 8000, (group, prefix))
    theirs = tunix_model(model)
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, rows, count in ((f"G={group}", prompts[:1], group), ("G=1", prompts, 1)):
            ours = {steps: Ours(Path(folder), rows, count, steps) for steps in (answer, 1)}
            sides[f"ours {name}"] = lambda steps, ours=ours: ours[steps].rollout()
            sides[f"tunix {name}"] = Tunix(theirs, rows.repeat(count, axis=0), answer).rollout
            tokens, found = (np.asarray(array).reshape(group, -1) for array in ours[answer].rollout())
            whole = np.concatenate([rows[:, :-1].repeat(count, axis=0), tokens], axis=1)
            gap = np.abs(logprobs(theirs, whole, answer) - found[:, 1:]).max()
            assert gap < 1e-3, f"the models differ: log-probabilities by {gap}"
    seconds = {name: {steps: [] for steps in (answer, 1)} for name in sides}
    for _ in range(options.repeats + 1):  # the first is a warm-up
        for name, rollout in sides.items():
            for steps in seconds[name]:
                spent, out = timed(rollout, steps)
                seconds[name][steps].append(spent)
                assert not name.startswith("tunix") or out.shape == (group, steps)
    seconds = {name: {steps: times[1:] for steps, times in both.items()} for name, both in seconds.items()}
    speed = {
        name: group * (answer - 1) / float(np.median(np.subtract(both[answer], both[1])))
        for name, both in seconds.items()
    }
    whole = {name: float(np.median(both[answer])) for name, both in seconds.items()}
    names = ("G=1", f"G={group}")
    result = {
        "sizes": sizes | {"parameters": sum(value.numel() for value in model.model.language_model.parameters())},
        "seconds": {name: {str(steps): times for steps, times in both.items()} for name, both in seconds.items()},
        "decode_tokens_a_second": speed,
        "times_tunix_in_decoding": {name: speed[f"ours {name}"] / speed[f"tunix {name}"] for name in names},
        "times_tunix_in_a_whole_rollout": {name: whole[f"tunix {name}"] / whole[f"ours {name}"] for name in names},
        "device": jax.devices()[0].device_kind,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "google-tunix")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
