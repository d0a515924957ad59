"""The jitted programs of a training step with abstract arguments, lowered for devices that need not exist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revseg_jax.compilation.work import Work
from revseg_jax.config import Config
from revseg_jax.errors import InputError
from revseg_jax.learner.experience import Experience, Scores
from revseg_jax.learner.update import Learner, TrainState, make_learner
from revseg_jax.parallel.rows import check_spread
from revseg_jax.parallel.sharding import Placement, tree_shardings
from revseg_jax.policy.attention import AttentionChoice
from revseg_jax.policy.attention_kernels import block_size, padded_length
from revseg_jax.policy.checkpoint import resolve_folder
from revseg_jax.policy.config import PUBLISHED, ModelConfig, read_config
from revseg_jax.policy.model import Policy
from revseg_jax.policy.text import PrefixCache, SuffixCache
from revseg_jax.rollout.batch import RolloutBatch
from revseg_jax.rollout.engine import answer_turn1, answer_turn2, read_prefix, read_turn2
from revseg_jax.rollout.layout import SlotLayout, slot_layout
from revseg_jax.rollout.loading import split_policy
from revseg_jax.rollout.sampling import SamplingConfig

PROGRAMS = ("prefill", "decode", "turn2", "decode2", "score", "update")


def model_config(path: str) -> ModelConfig:
    """Of a policy folder, or of a published model by its name; InputError when it is neither."""
    folder = resolve_folder(path)
    if folder.is_dir():
        return read_config(folder)
    if folder.name not in PUBLISHED:
        raise InputError(f"policy.path={path} is neither a folder nor one of {', '.join(PUBLISHED)}")
    return PUBLISHED[folder.name]


@dataclass(frozen=True)
class StepPrograms:
    """The programs of a training step on a mesh. All arrays are shapes with shardings; nothing is allocated.

    `lower(name)` gives, for a name of `PROGRAMS`: prefill (video and prompt into the cache), decode (the first answer),
    turn2 (keyframes and turn-2 prompts into the cache) and decode2 (the second answer), both not in a chain of one
    turn, score (one pass of the reference), update (loss, gradients, optimiser).
    """

    config: Config
    model: ModelConfig
    placement: Placement

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in PROGRAMS if name not in ("turn2", "decode2") or self.layout.turn2_prompt)

    def lower(self, name: str) -> jax.stages.Lowered:
        return getattr(self, f"_{name}")()

    # ---- Arguments --------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[nnx.GraphDef, Any, Any]:
        """(graphdef, trained, frozen) of the policy."""
        settings = self.config.policy
        policy = nnx.eval_shape(
            lambda: Policy(
                self.model,
                rngs=nnx.Rngs(0),
                dtype=jnp.dtype(settings.dtype),
                remat=settings.remat,
                attention=AttentionChoice("auto", self.placement),
            )
        )
        graphdef, *parameters = split_policy(policy, self.config.learner.freeze_vision)
        return graphdef, *(self._spread(part, settings.param_dtype) for part in parameters)

    @cached_property
    def layout(self) -> SlotLayout:
        return slot_layout(self.model, self.config.chain)

    @cached_property
    def learner(self) -> Learner:
        temperature = self.config.rollout.temperature
        return make_learner(self.parts[0], self.config.learner, self.layout, self.placement, temperature)

    @cached_property
    def state(self) -> TrainState:
        shapes = jax.eval_shape(self.learner._init, self.parts[1])
        return jax.tree.map(_shaped, shapes, self.learner.shardings(shapes))

    @cached_property
    def sampler(self) -> tuple[Any, Any]:
        """The parameters as sampling takes them, (trained, frozen)."""
        wanted = self.placement.with_width("rollout_width")
        return tuple(self._spread(part, self.config.policy.dtype, wanted) for part in self.parts[1:])

    @cached_property
    def reference(self) -> Any:
        """While it is on the devices; None without one."""
        settings = self.config.learner
        if settings.kl == "off":
            return None
        return self.parts[1] if settings.reference == "device" else self._spread(self.parts[1], "bfloat16")

    @property
    def prompts_per_batch(self) -> int:
        return self.config.rollout.prompts_per_batch or self.config.rollout.prompts_per_step

    @property
    def sampling(self) -> SamplingConfig:
        """Which tokens they are changes nothing in the program; that some are forbidden does."""
        rollout, forbidden = self.config.rollout, (self.model.image_token_id, self.model.video_token_id)
        return SamplingConfig(rollout.temperature, rollout.top_p, rollout.top_k, 1, 0, forbidden)

    def batch(self, prompts: int) -> RolloutBatch:
        chain, group, slots = self.config.chain, self.config.rollout.group_size, self.layout.suffix
        rows = self._rows

        def images(count: int, side: int) -> jax.ShapeDtypeStruct:
            return rows(jnp.uint8, prompts, count, side, side, 3)

        return RolloutBatch(
            frames=images(chain.frames, chain.frame_size),
            prefix_tokens=rows(jnp.int32, prompts, self.layout.prefix),
            prefix_positions=rows(jnp.int32, prompts, 3, self.layout.prefix),
            prefix_mask=rows(bool, prompts, self.layout.prefix),
            keyframes=images(group, chain.keyframe_size),
            keyframe_index=rows(jnp.int32, prompts, group),
            tokens=rows(jnp.int32, prompts, group, slots),
            positions=rows(jnp.int32, prompts, group, 3, slots),
            mask=rows(bool, prompts, group, slots),
            generated=rows(bool, prompts, group, slots),
            logprobs=rows(jnp.float32, prompts, group, slots),
        )

    def experience(self, prompts: int) -> Experience:
        batch, config = self.batch(prompts), self.config.learner
        critic = batch.logprobs if config.algorithm == "ppo" else None
        reference = batch.logprobs if config.kl != "off" else None
        return Experience(batch, Scores(batch.logprobs, reference, critic), batch.logprobs, critic)

    def caches(self, prompts: int) -> tuple[PrefixCache, SuffixCache]:
        text, group, layout = self.model.text, self.config.rollout.group_size, self.layout

        def cached(*matrices: int) -> jax.ShapeDtypeStruct:
            shape = (text.num_layers, prompts, text.num_kv_heads, *matrices)
            sharding = self.placement.sharding(shape, None, "prompts", "key_heads")
            return jax.ShapeDtypeStruct(shape, self.config.policy.dtype, sharding=sharding)

        width, prefix, suffix = text.head_dim, layout.prefix, layout.suffix
        return (
            PrefixCache(cached(width, prefix), cached(prefix, width), self._rows(bool, prompts, prefix)),
            SuffixCache(
                *(cached(group, width, suffix), cached(group, suffix, width)),
                self._rows(bool, prompts, group, suffix),
            ),
        )

    def _rows(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement.sharding(shape, "prompts"))

    def _spread(self, tree: Any, dtype: str, placement: Placement | None = None) -> Any:
        shardings = tree_shardings(tree, placement or self.placement)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), tree, shardings)

    # ---- Programs ---------------------------------------------------------------------------------------------------

    def _prefill(self) -> jax.stages.Lowered:
        batch = self.batch(self.prompts_per_batch)
        prefix = batch.prefix_tokens, batch.prefix_positions, batch.prefix_mask
        return read_prefix.lower(self.parts[0], self.sampler, batch.frames, *prefix)

    def _decode(self) -> jax.stages.Lowered:
        prefix, _ = self.caches(self.prompts_per_batch)
        static = self.parts[0], self.layout.turn1, self.layout.suffix, self.sampling
        return answer_turn1.lower(*static, self.sampler, prefix, *self._first_tokens)

    def _decode2(self) -> jax.stages.Lowered:
        static = self.parts[0], self.layout.turn2_start - 1, self.layout.turn2, self.sampling
        return answer_turn2.lower(*static, self.sampler, *self.caches(self.prompts_per_batch), *self._first_tokens)

    @property
    def _first_tokens(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What an answer begins with: token, position, alive and key of every rollout."""
        rows = self.prompts_per_batch, self.config.rollout.group_size
        token = self._rows(jnp.int32, *rows)
        return token, token, self._rows(bool, *rows), self._rows(jnp.uint32, *rows, 2)

    def _turn2(self) -> jax.stages.Lowered:
        prompts, group = self.prompts_per_batch, self.config.rollout.group_size
        batch, slots = self.batch(prompts), self.layout.turn2_prompt - 1
        return read_turn2.lower(
            *(self.parts[0], self.layout.turn2_prompt_start, self.sampler, *self.caches(prompts)),
            self._rows(jnp.int32, prompts, group, slots),
            self._rows(jnp.int32, prompts, group, 3, slots),
            self._rows(bool, prompts, group, slots),
            *(batch.keyframes, batch.keyframe_index),
        )

    def _score(self) -> jax.stages.Lowered:
        batch = self.batch(self.config.rollout.prompts_per_step)
        reference = self.parts[1] if self.reference is None else self.reference
        return Learner.logprobs.lower(self.learner, reference, self.parts[2], batch)

    def _update(self) -> jax.stages.Lowered:
        experience = self.experience(self.config.rollout.prompts_per_step)
        return Learner.update.lower(self.learner, self.state, self.parts[2], experience)

    # ---- What is known of them --------------------------------------------------------------------------------------

    def loop_limit(self, name: str) -> int:
        """Turns of the loops whose length depends on the data."""
        return 1 + {"decode": self.layout.turn1, "decode2": self.layout.turn2}.get(name, 0)

    def kernel_flops(self, work: Work) -> float:
        """Of one run of the splash kernel: two products a visible pair of blocks forward; backward four for keys and
        values and three for queries of the suffixes, five in one kernel of the rest. Operands are [.., heads, slots,
        width]."""
        long = [array.shape for array in work.arrays if len(array.shape) >= 3 and array.dtype in ("bf16", "f32")]
        (heads, queries, width), keys = long[0][-3:], long[1][-2]
        products = next(n for mark, n in (("dkv", 4.0), ("dq", 3.0), ("", 2.0)) if mark in work.source)
        if products == 4 and not self._of_suffixes(queries, keys):
            products = 5.0
        rows = int(np.prod(long[0][:-3], dtype=np.int64))
        return 2 * products * rows * heads * queries * keys * width * self._visible(queries, keys, width)

    def _of_suffixes(self, queries: int, keys: int) -> bool:
        """Whether a kernel's slots are those of all suffixes over prefix and suffixes."""
        suffixes = self.config.rollout.group_size * padded_length(self.layout.suffix)
        return (queries, keys) == (suffixes, padded_length(self.layout.prefix) + suffixes)

    def _visible(self, queries: int, keys: int, width: int) -> float:
        """The share of the pairs of a kernel's slots whose blocks its mask shows."""
        own, shared = padded_length(self.layout.suffix), padded_length(self.layout.prefix)
        if self._of_suffixes(queries, keys):
            return (shared + (own + block_size(math.gcd(own, shared))) / 2) / keys
        causal = queries == shared and width >= self.model.text.head_dim
        return (1 + block_size(shared) / shared) / 2 if causal else 1.0

    def memory(self) -> dict[str, int]:
        """Bytes a chip of what stays during a step, by kind."""
        reference = 0 if self.config.learner.reference == "host" else chip_bytes(self.reference)
        own = self.config.policy.dtype == self.config.policy.param_dtype
        same = own and self.placement.over("width") == self.placement.over("rollout_width")
        return {
            "parameters": chip_bytes((self.parts[1:], self.state.critic and self.state.critic[0])),
            "optimizer": chip_bytes((self.state.optimizer, self.state.critic and self.state.critic[1])),
            "reference": reference,
            "sampler": 0 if same else chip_bytes(self.sampler),
            "kv_cache": chip_bytes(self.caches(self.prompts_per_batch)),
            "batch": chip_bytes(self.experience(self.config.rollout.prompts_per_step)),
        }

    def largest_arguments(self, count: int) -> list[tuple[str, int]]:
        """The largest arrays of the state, with their bytes a chip."""
        named = jax.tree_util.tree_leaves_with_path({"state": self.state, "reference": self.reference})
        sized = [(jax.tree_util.keystr(path), chip_bytes(leaf)) for path, leaf in named]
        return sorted(sized, key=lambda pair: -pair[1])[:count]

    def full_batch(self) -> RolloutBatch:
        """A step's batch on the host in which every slot is real and every keyframe another, without its memory."""
        shapes = self.batch(self.config.rollout.prompts_per_step)
        ones = RolloutBatch(*(np.broadcast_to(np.ones((), shape.dtype), shape.shape) for shape in shapes))
        generated = np.isin(np.arange(self.layout.suffix), self.layout.sampled)
        index = np.arange(self.config.rollout.group_size)
        return ones._replace(
            generated=np.broadcast_to(generated, ones.generated.shape),
            keyframe_index=np.broadcast_to(index, ones.keyframe_index.shape),
        )


def make_programs(config: Config, placement: Placement) -> StepPrograms:
    """Raises InputError for an unknown policy or numbers of prompts that the mesh cannot spread evenly."""
    check_spread(placement, config)
    return StepPrograms(config, model_config(config.policy.path), placement)


def chip_bytes(tree: Any) -> int:
    """What one chip holds of a tree of shapes with shardings."""
    shapes = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * jnp.dtype(x.dtype).itemsize for x in shapes)


def _shaped(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
