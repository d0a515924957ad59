"""From a config to a policy that can sample: checkpoint, tokenizer, mesh, sharded parameters, engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from revseg_jax.chain.prompts import validate_templates
from revseg_jax.config import ChainConfig, Config, check, named_fields
from revseg_jax.data.example import Batch
from revseg_jax.parallel.sharding import Placement, make_placement
from revseg_jax.policy.checkpoint import load_policy, read_chain, resolve_folder
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
    def placement(self) -> Placement:
        return self.engine.placement


def spoken_chain(config: Config, paths: Sequence[str], overrides: Sequence[str]) -> Config:
    """The config with the chain of the policy's own chain.yaml, where it has one, but for those of its fields that the
    YAML files and overrides name. Raises InputError when the rest of the config does not fit it."""
    spoken = read_chain(resolve_folder(config.policy.path))
    if spoken is None:
        return config
    changed = {name: getattr(config.chain, name) for name in named_fields("chain", paths, overrides)}
    config = replace(config, chain=replace(spoken, **changed))
    check(config)
    return config


def inference_dtype() -> str:
    """What a policy that is not trained computes in, where nobody says otherwise."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def with_inference_dtypes(config: Config, paths: Sequence[str], overrides: Sequence[str]) -> Config:
    """The config with `inference_dtype` and parameters of the policy's own type, but for what the YAML files and
    overrides name."""
    named, policy = named_fields("policy", paths, overrides), config.policy
    dtype = policy.dtype if "dtype" in named else inference_dtype()
    param_dtype = policy.param_dtype if "param_dtype" in named else dtype
    return replace(config, policy=replace(policy, dtype=dtype, param_dtype=param_dtype))


def load_engine(config: Config, chain: ChainConfig | None = None) -> LoadedEngine:
    """Raises InputError for a bad checkpoint folder, mesh or prompt template. `chain` overrides the config's."""
    chain = chain or config.chain
    validate_templates(chain)
    placement, policy = make_placement(config.mesh), config.policy
    loaded = load_policy(
        policy.path, policy.dtype, policy.param_dtype, policy.remat, placement.mesh, axes=config.mesh.axes
    )
    encoder = PromptEncoder(loaded.tokenizer, loaded.policy.config, chain)
    sampling = sampling_config(loaded.tokenizer, loaded.policy.config.text.vocab_size, config.rollout)
    graphdef, trained, frozen = split_policy(loaded.policy, config.learner.freeze_vision)
    return LoadedEngine(RolloutEngine(graphdef, encoder, sampling, placement), trained, frozen, loaded.folder)


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
