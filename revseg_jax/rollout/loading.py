"""From a config to a policy that can sample: checkpoint, tokenizer, mesh, sharded parameters, engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from revseg_jax.chain.prompts import validate_templates
from revseg_jax.config import ChainConfig, Config
from revseg_jax.data.example import Batch
from revseg_jax.parallel.mesh import make_mesh
from revseg_jax.parallel.sharding import tree_shardings
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.rollout.engine import Prompt, RolloutEngine
from revseg_jax.rollout.layout import PromptEncoder
from revseg_jax.rollout.sampling import sampling_config


@dataclass(frozen=True)
class LoadedEngine:
    """Attributes:
    engine: samples as the config says; `greedy` is its deterministic twin
    trained, frozen: the policy's parameters on the mesh; `nnx.merge(engine.graphdef, trained, frozen)`
    folder: where the policy was read from
    """

    engine: RolloutEngine
    trained: Any
    frozen: Any
    folder: Path

    @property
    def greedy(self) -> RolloutEngine:
        return replace(self.engine, sampling=self.engine.sampling.greedy())

    @property
    def mesh(self) -> Mesh:
        return self.engine.mesh


def load_engine(config: Config, chain: ChainConfig | None = None) -> LoadedEngine:
    """Raises InputError for a bad checkpoint folder, mesh or prompt template. `chain` overrides the config's."""
    loaded = load_policy(config.policy.path, config.policy.dtype, config.policy.param_dtype, config.policy.remat)
    chain = chain or config.chain
    validate_templates(chain)
    mesh = make_mesh(config.mesh)
    encoder = PromptEncoder(loaded.tokenizer, loaded.policy.config, chain)
    sampling = sampling_config(loaded.tokenizer, loaded.policy.config.text.vocab_size, config.rollout)
    graphdef, trained, frozen = split_policy(loaded.policy, config.learner.freeze_vision)
    trained, frozen = (jax.device_put(part, tree_shardings(part, mesh)) for part in (trained, frozen))
    return LoadedEngine(RolloutEngine(graphdef, encoder, sampling, mesh), trained, frozen, loaded.folder)


def split_policy(policy: nnx.Module, freeze_vision: bool) -> tuple[nnx.GraphDef, Any, Any]:
    """(graphdef, trained parameters, frozen parameters); `nnx.merge` takes them back in this order."""
    frozen = nnx.PathContains("vision") if freeze_vision else nnx.Nothing()
    return nnx.split(policy, nnx.Not(frozen), frozen)


def prompts_of(batch: Batch) -> list[Prompt]:
    """The policy's side of a batch of examples."""
    return [
        Prompt(
            query=batch.query[b],
            frames=batch.frames[b],
            frame_count=int(batch.frame_count[b]),
            seconds=float(batch.seconds[b]),
            jpegs=batch.jpegs[b],
            size=(int(batch.size[b, 0]), int(batch.size[b, 1])),
        )
        for b in range(len(batch))
    ]
