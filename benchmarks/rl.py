"""Rollout and update of a group: the shared prefix against the per-sample layout and against transformers with torch.

    python benchmarks/rl.py [--small] [--repeats 3] [--out rl.json]

One model, one prompt of `prefix` text tokens, `group` answers of `answer` tokens each, then one policy-gradient step on
them, in float32 on this machine's CPU (a GPU is left alone: torch's side runs on the CPU). The sides take turns in one
process, so that their ratios mean something on a machine that does other things too; every repeat is in the JSON.
"Per-sample" is this project's own code with the group as so many prompts of one rollout each. Torch does what its user
writes: `generate` with a cache, then forward and backward of the whole sequences, with logits of the answers only.
Activation memory is what XLA plans for the update beside its inputs and outputs (`memory_analysis`), so it does not
depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from revseg_jax.config import LearnerConfig, PolicyConfig
from revseg_jax.learner.forward import token_logprobs
from revseg_jax.learner.losses import policy_losses, token_weights
from revseg_jax.policy.config import read_config
from revseg_jax.policy.hf_weights import load_weights
from revseg_jax.policy.model import Policy, PrefixTokens
from revseg_jax.policy.text import empty_suffix_cache
from revseg_jax.rollout.sampling import SamplingConfig, decode_answer, rollout_keys

SIZES = {"prefix": 1024, "answer": 128, "group": 8}
SMALL = {"prefix": 256, "answer": 32, "group": 8}
TEXT = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8}
SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LEARNING_RATE = 1e-6
NEVER = SamplingConfig(1.0, 1.0, 0, end_token=-1, pad_token=0, forbidden=())  # no answer ends early


def torch_model(small: bool) -> Qwen2_5_VLForConditionalGeneration:
    text = SMALL_TEXT if small else TEXT
    section = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [section // 2, section // 4, section // 4]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [0]}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8192,
            "num_key_value_heads": text["num_attention_heads"] // 4,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": None,
            **text,
        },
        vision_config={"out_hidden_size": text["hidden_size"], **vision},
        image_token_id=8190,
        video_token_id=8191,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).train()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class Ours:
    """Rollout and update with B prompts [B, length] of G rollouts each: B = 1 shares the prefix, G = 1 repeats it."""

    def __init__(self, folder: Path, prompts: np.ndarray, group: int, answer: int):
        config = read_config(folder)
        policy = nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0), remat=PolicyConfig().remat))
        load_weights(folder, policy, "float32")
        self.graphdef, params = nnx.split(policy)
        self.optimizer = optax.adamw(LEARNING_RATE)
        self.state = (params, jax.jit(self.optimizer.init)(params))
        self.answer, self.text = answer, config.text
        self.prefix = jnp.asarray(prompts[:, :-1], jnp.int32)
        self.last = jnp.repeat(jnp.asarray(prompts[:, -1:], jnp.int32), group, axis=1)
        self.keys = rollout_keys(0, 0, np.arange(len(prompts)), group)
        self.rollout_program = jax.jit(self._rollout)

    def _before(self) -> PrefixTokens:
        prompts, length = self.prefix.shape
        positions = jnp.broadcast_to(jnp.arange(length), (3, prompts, length))
        return PrefixTokens(self.prefix, positions, jnp.ones((prompts, length), bool), None)

    def _rollout(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Suffix tokens [B, G, 1 + answer] and their log-probabilities."""
        policy = nnx.merge(self.graphdef, params)
        slots = 1 + self.answer
        cache = empty_suffix_cache(self.text, *self.last.shape, slots, jnp.float32)
        start, alive = jnp.full(self.last.shape, self.prefix.shape[1]), jnp.ones(self.last.shape, bool)
        tokens, logprobs, _, _ = decode_answer(
            policy,
            policy.prefill(self._before()).cache(),
            cache,
            self.last,
            start,
            alive,
            self.keys,
            0,
            self.answer,
            NEVER,
        )
        return jnp.concatenate([self.last[..., None], tokens], -1), jnp.pad(logprobs, ((0, 0), (0, 0), (1, 0)))

    def _update(self, state: Any, rollouts: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        tokens, old = rollouts
        generated = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) > 0, tokens.shape)
        weights = token_weights(generated, "sequence_mean", self.answer)
        config = replace(LearnerConfig(), kl="off")

        def loss(params):
            policy = nnx.merge(self.graphdef, params)
            positions = jnp.broadcast_to(self.prefix.shape[1] + jnp.arange(tokens.shape[-1]), (3, *tokens.shape))
            hidden = policy.suffix_hidden(self._before(), tokens, positions, jnp.ones(tokens.shape, bool))
            logprobs, entropy = token_logprobs(policy, hidden, tokens, np.arange(1, tokens.shape[-1]), 512)
            advantages = jnp.ones(tokens.shape)
            losses, _ = policy_losses(config, logprobs, entropy, old, old, None, advantages, generated)
            return (losses * weights).sum()

        params, optimizer = state
        value, gradients = jax.value_and_grad(loss)(params)
        updates, optimizer = self.optimizer.update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), value

    @cached_property
    def update_program(self) -> jax.stages.Compiled:
        update = jax.jit(self._update, donate_argnums=0)
        return update.lower(self.state, jax.eval_shape(self._rollout, self.state[0])).compile()

    def rollout(self):
        return jax.block_until_ready(self.rollout_program(self.state[0]))

    def update(self, rollouts) -> None:
        self.state, value = self.update_program(self.state, rollouts)
        value.block_until_ready()

    @property
    def activation_bytes(self) -> int:
        return self.update_program.memory_analysis().temp_size_in_bytes


class Torch:
    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, prompt: np.ndarray, group: int, answer: int):
        self.model, self.answer, self.group = model, answer, group
        self.prompt = torch.tensor(prompt[None])
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def rollout(self) -> torch.Tensor:
        """Tokens [G, prompt + answer]."""
        with torch.no_grad():
            return self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=True,
                top_k=0,
                num_return_sequences=self.group,
                min_new_tokens=self.answer,
                max_new_tokens=self.answer,
            )

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, answer] of the tokens after the prompt."""
        logits = self.model(tokens, use_cache=False, logits_to_keep=self.answer + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, -self.answer :, None])[..., 0]

    def update(self, tokens: torch.Tensor) -> None:
        logprobs = self.logprobs(tokens)
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def timed(call: Callable, *arguments) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size that runs in a minute")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; XLA takes all cores it may use")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    sizes = SMALL if options.small else SIZES
    torch.set_num_threads(options.threads)
    jax.config.update("jax_platforms", "cpu")

    model = torch_model(options.small)
    prompt = np.random.default_rng(0).integers(0, 8000, sizes["prefix"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        group, answer = sizes["group"], sizes["answer"]
        shared = Ours(Path(folder), prompt[None], group, answer)
        separate = Ours(Path(folder), np.tile(prompt, (group, 1)), 1, answer)
    sides = {"shared_prefix": shared, "per_sample": separate, "torch": Torch(model, prompt, group, answer)}

    # The same model: torch's log-probabilities of what ours sampled.
    tokens, logprobs = (np.asarray(array)[0] for array in shared.rollout())
    with torch.no_grad():
        whole = torch.tensor(np.concatenate([np.tile(prompt[:-1], (group, 1)), tokens], 1), dtype=torch.long)
        gap = np.abs(sides["torch"].logprobs(whole).numpy() - logprobs[:, 1:]).max()
    assert gap < 1e-3, f"the models differ: log-probabilities by {gap}"

    seconds = {name: {"rollout": [], "update": []} for name in sides}
    for _ in range(options.repeats + 1):  # the first is a warm-up
        for name, side in sides.items():
            rollout_seconds, rollouts = timed(side.rollout)
            seconds[name]["rollout"].append(rollout_seconds)
            seconds[name]["update"].append(timed(side.update, rollouts)[0])
    seconds = {name: {phase: times[1:] for phase, times in phases.items()} for name, phases in seconds.items()}
    both = {name: float(np.median(np.add(*phases.values()))) for name, phases in seconds.items()}
    ours = both["shared_prefix"]
    result = {
        "sizes": sizes
        | {"parameters": sum(parameter.numel() for parameter in model.model.language_model.parameters())},
        "seconds": seconds,
        "activation_bytes": {name: sides[name].activation_bytes for name in ("shared_prefix", "per_sample")},
        "largest_logprob_difference_to_torch": float(gap),
        "times_faster_than_per_sample": both["per_sample"] / ours,
        "times_less_memory_than_per_sample": separate.activation_bytes / shared.activation_bytes,
        "times_faster_than_torch": both["torch"] / ours,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "torch_threads": options.threads},
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
