"""The typed configuration tree: YAML files and `key=value` overrides become frozen dataclasses.

OmegaConf does the merging and type checks; `load_config` turns its errors into one-line `InputError`s and
adds the checks that involve more than one field. Every default here is the paper's value where it states one
(arXiv 2512.02835); fields marked "not stated in the paper" are this project's documented choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from revseg_jax.errors import InputError
from revseg_jax.paths import AnyPath, path_of

TURN1_PROMPT = (
    'The video lasts {seconds:.1f} seconds and is shown as {frames} frames at fps={fps:g}. Question: "{query}"\n'
    "Think first: find the object that answers the question, using when things happen and what they look like in "
    "detail, and compare it with the other candidates. Then choose the keyframe in which it is easiest to segment: "
    "visible, unoccluded, large, distinct, sharp and centred. Describe the object's static appearance in that frame.\n"
    "Write your reasoning inside <think></think> and the answer inside <answer></answer>. The answer is a JSON list "
    'with one object: [{{"frame_idx": <0-based index of the keyframe>, "object description": "<appearance>"}}]'
)
TURN2_PROMPT = (
    "Here is the extracted keyframe. Detect '{description}' and answer with its box coordinates in JSON inside "
    '<answer></answer>: [{{"bbox_2d": [x1, y1, x2, y2], "label": "<object>"}}]'
)
ONE_TURN_PROMPT = (
    'The video lasts {seconds:.1f} seconds and is shown as {frames} frames at fps={fps:g}. Question: "{query}"\n'
    "Think first: find the object that answers the question, using when things happen and what they look like in "
    "detail, and compare it with the other candidates. Then choose the keyframe in which it is easiest to segment: "
    "visible, unoccluded, large, distinct, sharp and centred. Detect the object in that frame.\n"
    "Write your reasoning inside <think></think> and the answer inside <answer></answer>. The answer is a JSON list "
    'with one object: [{{"frame_idx": <0-based index of the keyframe>, "bbox_2d": [x1, y1, x2, y2]}}]'
)


@dataclass(frozen=True)
class ChainConfig:
    """What the two turns look like to the policy. Saved beside an exported checkpoint as `chain.yaml`."""

    frames: int = 16  # frames shown in turn 1, sampled uniformly over the clip
    frame_size: int = 448  # side of a turn-1 frame after the square resize, pixels
    keyframe_size: int = 840  # side of the turn-2 keyframe after the square resize, pixels
    fps: float = 2.0  # stated in the turn-1 prompt and used for the video's temporal rotary positions
    system_prompt: str = "You are a helpful assistant."
    turns: int = 2  # 1: keyframe and box in one answer, without a look at the keyframe (the paper's ablation)
    turn1_prompt: str = TURN1_PROMPT  # fields: query, frames, seconds, fps
    turn2_prompt: str = TURN2_PROMPT  # fields: description
    one_turn_prompt: str = ONE_TURN_PROMPT  # in the place of both when turns is 1; fields: those of turn1_prompt
    query_tokens: int = 256  # slots for everything of the turn-1 prompt that is text
    turn1_tokens: int = 512  # limit of the first answer (not stated in the paper)
    turn2_prompt_tokens: int = 160  # slots for everything of the turn-2 prompt that is text
    turn2_tokens: int = 128  # limit of the second answer (not stated in the paper)

    @property
    def box_size(self) -> int:
        """Side of the square frame in whose pixels the policy writes its box."""
        return self.keyframe_size if self.turns == 2 else self.frame_size


@dataclass(frozen=True)
class PolicyConfig:
    path: str = "embedded"  # folder in Hugging Face layout, or "embedded" for the tiny policy shipped here
    dtype: str = "float32"  # of activations: float32 | bfloat16
    param_dtype: str = "float32"  # of the trained parameters and the optimiser state
    remat: str = "dots"  # in the backward pass: none | dots | dots_with_no_batch_dims | full (the least memory)


@dataclass(frozen=True)
class DataConfig:
    train: list[str] = field(default_factory=list)  # folders written by `revseg prepare` (array_record)
    weights: list[float] = field(default_factory=list)  # share of each folder in training; none: by its size
    test: list[str] = field(default_factory=list)
    train_split: str = "train"
    test_split: str = "test"
    test_clips: int = 0  # how many test examples to evaluate; 0 means all
    workers: int = 0  # processes that read and decode ahead; 0: a thread of this one


@dataclass(frozen=True)
class TrackerConfig:
    endpoints: list[str] = field(default_factory=list)  # "host:port" of running sidecars; empty starts one here
    checkpoint: str = "embedded"
    config: str = "embedded"
    threads: int = 0  # of a sidecar started here; 0 leaves it to torch
    deadline_seconds: float = 120.0  # of one request
    patience: float = 300.0  # seconds that sidecars may be away or full before training saves and stops
    token_file: str = ""  # holds the sidecars' bearer token; it needs TLS to other machines
    tls_ca: str = ""  # PEM file of the authority that signed the sidecars' certificates; empty: no TLS
    tls_certificate: str = ""  # PEM files of this client, for sidecars that ask for a certificate
    tls_key: str = ""


@dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: int = 128
    group_size: int = 8  # rollouts per prompt
    prompts_per_batch: int = 0  # prompts sampled together on the devices; 0 means all of a step
    temperature: float = 1.0  # not stated in the paper; what is trained is the distribution at this temperature
    top_p: float = 1.0
    top_k: int = 0  # 0 means off
    resample_limit: int = 0  # batches drawn in place of groups without spread (DAPO's dynamic sampling); 0 means off


@dataclass(frozen=True)
class RewardsConfig:
    preset: str = "paper_curves"  # paper_text | paper_curves | custom
    format: float | None = None  # these three weights are of the preset "custom"; null there is 0
    temporal: float | None = None
    spatial: float | None = None
    mask: float = 0.0  # 0 in the paper; needs the sidecar when above 0. Added to any preset.
    temporal_kind: str = "soft"  # none | binary | soft
    spatial_kind: str = "threshold"  # threshold (IoU > 0.5) | iou
    mask_kind: str = "j"  # j | jf
    mask_frames: int = 0  # of the shown ones, evenly spread, on which masks are compared; 0 means all
    # An answer loses reward over the last this many tokens of its limit, at most over the last fifth (DAPO); 0: off.
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0  # what an answer that reaches its limit loses


@dataclass(frozen=True)
class PPOConfig:
    """Read when learner.algorithm is ppo."""

    critic: str = "trunk"  # trunk: a copy of the policy that learns by itself | head: a value head on the policy
    learning_rate: float = 1e-5  # of the critic's own parameters
    value_coefficient: float = 0.5  # of the value loss
    value_clip: float = 0.2  # how far a value may move from the old one before it earns nothing; 0 means off
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True  # advantages to mean 0, deviation 1 over all tokens of a step


@dataclass(frozen=True)
class LearnerConfig:
    algorithm: str = "grpo"  # grpo | ppo
    # grpo: (r - mean) / std of the group, the std without the KL | dr_grpo: r - mean | rloo: r - mean of the others
    advantage: str = "grpo"
    credit: str = "trajectory"  # trajectory: all tokens share the total | turn: each turn its rewards from there on
    aggregation: str = "sequence_mean"  # of token losses: sequence_mean | token_mean | constant (the token limits)
    ratio: str = "token"  # token | sequence (GSPO: the geometric mean of a rollout's token ratios)
    epochs: int = 1  # passes over a step's rollouts
    minibatches: int = 1  # optimiser steps a pass, over whole groups
    learning_rate: float = 1e-6
    warmup_steps: int = 0  # optimiser steps, the first at a rate of 0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    clip_low: float = 0.2  # the ratio is 1 on-policy: clips matter with several epochs or minibatches
    clip_high: float = 0.2
    dual_clip: float = 0.0  # limit of the ratio where the advantage is negative, above 1; 0 means off
    importance_cap: float = 0.0  # truncated importance sampling between sampler and trainer; 0 trusts the sampler
    kl: str = "loss"  # where KL to the frozen reference goes: loss | reward (in bfloat16 with importance_cap) | off
    kl_estimator: str = "k3"  # k1 | k2 | k3
    kl_coefficient: float = 1e-3
    reference: str = "device"  # device: the start policy itself | bfloat16: a copy | host: a copy in host memory
    entropy_coefficient: float = 0.0  # of the entropy bonus
    prompts_per_microbatch: int = 0  # gradient accumulation by groups; 0 means all of a minibatch at once
    logprob_chunk: int = 512  # token positions of a device whose logits exist at a time; the head is gathered for each
    freeze_vision: bool = False  # not stated in the paper
    max_bad_steps: int = 5  # steps in a row with a loss or gradient that is not finite before the run stops
    ppo: PPOConfig = field(default_factory=PPOConfig)


def _over(*mesh_axes: str) -> list[str]:
    return field(default_factory=lambda: list(mesh_axes))


@dataclass(frozen=True)
class AxesConfig:
    """The table of all sharding: over which mesh axes each logical axis is spread. None: every device has it whole."""

    prompts: list[str] = _over("slice", "data", "fsdp")  # of rollouts, activations and KV caches
    heads: list[str] = _over("tensor")  # of queries: parameters and activations
    key_heads: list[str] = _over("tensor")  # of keys and values: parameters, activations and KV caches
    hidden: list[str] = _over("tensor")  # the inner axis of the MLPs
    vocab: list[str] = _over("tensor")
    width: list[str] = _over("fsdp")  # of parameters and gradients; a layer is gathered when it is its turn
    optimizer_width: list[str] = _over("fsdp")  # of the optimiser's moments
    rollout_width: list[str] = _over()  # of the copy that samples, made once a step in the activations' type


@dataclass(frozen=True)
class MeshConfig:
    slice: int = 1  # slices of a pod that only the slower network joins
    data: int = 1
    fsdp: int = -1  # -1 takes all the devices that are left
    tensor: int = 1
    axes: AxesConfig = field(default_factory=AxesConfig)


@dataclass(frozen=True)
class RunConfig:
    dir: str = MISSING
    seed: int = 0
    steps: int = 525
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # the newest ones
    keep_best: int = 1  # of those that were evaluated, besides the newest: by J&F
    traces_every: int = 10  # steps between saved chains
    evaluate_every: int = 0  # steps between evaluations on data.test, the first before step 1; 0: none
    deterministic: bool = False  # GPU kernels that repeat bit for bit, at some cost in speed
    wandb: str = ""  # a Weights & Biases project that gets the metrics too; empty: none


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def load_config(path: str | Path | Sequence[str | Path] | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or several of which later ones win (None: the defaults), and applies `key=value` overrides.

    Raises InputError in one line: a missing or unreadable file, an unknown key, a value of the wrong type, or a
    combination of fields that cannot work.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else path or []
    path = None  # the one being read
    try:
        tree = OmegaConf.structured(Config)
        for node in (tree, *tree.values(), tree.learner.ppo, tree.mesh.axes):
            OmegaConf.set_readonly(node, False)  # frozen dataclasses give read-only nodes, and merging writes
        for path in paths:
            tree = OmegaConf.merge(tree, OmegaConf.load(io.StringIO(config_file(path).read_text("utf-8"))))
        path = None
        for override in overrides:
            if "=" not in override:
                raise InputError(f"{override!r} is not an option of the form key=value")
            try:
                OmegaConf.from_dotlist([override])
            except yaml.YAMLError as error:
                hint = "; a list with spaces needs quotes: 'data.train=[A, B]'" if "=[" in override else ""
                raise InputError(f"{override!r}: its value is not valid YAML: {yaml_fault(error)}{hint}") from None
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        path = paths[0] if len(paths) == 1 else None
        if OmegaConf.is_missing(tree.run, "dir"):
            raise InputError("run.dir is missing: add run.dir=FOLDER")
        if tree.learner.kl == "False":  # as YAML reads an off without quotes
            tree.learner.kl = "off"
        for key in PATHS:
            OmegaConf.update(tree, key, at_home(OmegaConf.select(tree, key)))
        config = OmegaConf.to_object(tree)
    except FileNotFoundError:
        packaged = f"configs/{path}"
        hint = f"; did you mean {packaged}?" if config_file(packaged).is_file() else ""
        raise InputError(f"config file {path} does not exist{hint}") from None
    except OmegaConfBaseException as error:
        where = f"{path}: " if path is not None else ""
        key = getattr(error, "full_key", None)
        meant = difflib.get_close_matches(key, field_names(Config)) if isinstance(error, ConfigKeyError) else ()
        hint = f"; did you mean {meant[0]}?" if meant else ""
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"it is a list: write {key}=[A] or {key}=[A,B]"
        elif "Incompatible value 'None'" in reason:
            reason = "it is empty"
        raise InputError(f"{where}{f'{key}: ' if key else ''}{reason}{hint}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not valid YAML: {yaml_fault(error)}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config file {path}: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def at_home(value: Any) -> Any:
    """A path, or a list of paths, with the home folder for ~, which shells leave alone behind a key=."""
    return os.path.expanduser(value) if isinstance(value, str) else [*map(os.path.expanduser, value)]


def config_file(name: str | Path) -> AnyPath:
    """The file of that name, or else the one that came with this package: configs/demo.yaml is found anywhere."""
    path, packaged = path_of(name), Path(__file__).parent / name
    return packaged if packaged.is_file() and not path.exists() else path


def field_names(of: type, before: str = "") -> list[str]:
    """All keys of a tree of dataclasses: run, run.dir, ..."""
    names = []
    for name, kind in get_type_hints(of).items():
        names.append(before + name)
        if dataclasses.is_dataclass(kind):
            names += field_names(kind, f"{before}{name}.")
    return names


def named_fields(section: str, paths: Sequence[str | Path], overrides: Sequence[str]) -> set[str]:
    """The fields of a section that YAML files or `key=value` overrides, which `load_config` has accepted, give."""
    trees = [OmegaConf.load(io.StringIO(config_file(path).read_text("utf-8"))) for path in paths]
    trees.append(OmegaConf.from_dotlist(list(overrides)))
    return {str(key) for tree in trees for key in tree.get(section) or ()}


def yaml_fault(error: yaml.YAMLError) -> str:
    """In one line, as YAML's own messages are not."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {error.problem}" if mark else str(error).splitlines()[0]


PATHS = (
    "run.dir", "policy.path", "data.train", "data.test", "tracker.checkpoint", "tracker.config", "tracker.token_file",
    "tracker.tls_ca", "tracker.tls_certificate", "tracker.tls_key",
)  # fmt: skip
AT_LEAST_ONE = (
    "chain.frames", "chain.frame_size", "chain.keyframe_size", "chain.query_tokens", "chain.turn1_tokens",
    "chain.turn2_prompt_tokens", "chain.turn2_tokens", "rollout.prompts_per_step", "rollout.group_size",
    "learner.epochs", "learner.minibatches", "learner.logprob_chunk", "learner.max_bad_steps", "run.checkpoint_every",
    "run.keep_checkpoints",
)  # fmt: skip
ABOVE_ZERO = (
    "chain.fps", "tracker.deadline_seconds", "learner.learning_rate", "learner.max_gradient_norm",
    "learner.ppo.learning_rate",
)  # fmt: skip
NOT_NEGATIVE = (
    "run.seed", "run.steps", "run.keep_best", "run.evaluate_every", "run.traces_every", "data.test_clips",
    "data.workers", "tracker.threads", "tracker.patience", "rollout.prompts_per_batch", "rollout.temperature",
    "rollout.top_k", "rollout.resample_limit", "rewards.mask", "rewards.mask_frames", "rewards.overlong_tokens",
    "rewards.overlong_penalty", "learner.warmup_steps", "learner.weight_decay", "learner.clip_low",
    "learner.clip_high", "learner.importance_cap", "learner.kl_coefficient", "learner.entropy_coefficient",
    "learner.prompts_per_microbatch", "learner.ppo.value_coefficient", "learner.ppo.value_clip",
)  # fmt: skip


def check(config: Config) -> None:
    """Raises InputError for values that cannot work, alone or together."""
    choices = {
        ("chain.turns", config.chain.turns): (1, 2),
        ("rewards.preset", config.rewards.preset): ("paper_text", "paper_curves", "custom"),
        ("rewards.temporal_kind", config.rewards.temporal_kind): ("none", "binary", "soft"),
        ("rewards.spatial_kind", config.rewards.spatial_kind): ("threshold", "iou"),
        ("rewards.mask_kind", config.rewards.mask_kind): ("j", "jf"),
        ("learner.algorithm", config.learner.algorithm): ("grpo", "ppo"),
        ("learner.advantage", config.learner.advantage): ("grpo", "dr_grpo", "rloo"),
        ("learner.credit", config.learner.credit): ("trajectory", "turn"),
        ("learner.aggregation", config.learner.aggregation): ("sequence_mean", "token_mean", "constant"),
        ("learner.ratio", config.learner.ratio): ("token", "sequence"),
        ("learner.kl", config.learner.kl): ("loss", "reward", "off"),
        ("learner.kl_estimator", config.learner.kl_estimator): ("k1", "k2", "k3"),
        ("learner.reference", config.learner.reference): ("device", "bfloat16", "host"),
        ("learner.ppo.critic", config.learner.ppo.critic): ("trunk", "head"),
        ("policy.dtype", config.policy.dtype): ("float32", "bfloat16"),
        ("policy.param_dtype", config.policy.param_dtype): ("float32", "bfloat16"),
        ("policy.remat", config.policy.remat): ("none", "dots", "dots_with_no_batch_dims", "full"),
    }
    for (key, value), allowed in choices.items():
        if value not in allowed:
            raise InputError(f"{key}={value} is not one of {', '.join(map(str, allowed))}")
    for keys, fits, wanted in (
        (AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
        (ABOVE_ZERO, lambda value: 0 < value < math.inf, "be a number above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "not be negative"),
    ):
        for key in keys:
            value = attrgetter(key)(config)
            if not fits(value):  # nan fits nothing
                raise InputError(f"{key}={value:g} must {wanted}")
    if config.run.seed >= 2**32:
        raise InputError(f"run.seed={config.run.seed} must be below {2**32}")
    if not 0 < config.rollout.top_p <= 1:
        raise InputError(f"rollout.top_p={config.rollout.top_p:g} must be above 0 and at most 1")
    prompts = config.rollout.prompts_per_step
    for key, part in (
        ("rollout.prompts_per_batch", config.rollout.prompts_per_batch),
        ("learner.minibatches", config.learner.minibatches),
    ):
        if part and prompts % part:
            raise InputError(f"{key}={part} must divide rollout.prompts_per_step={prompts}")
    micro, mini = config.learner.prompts_per_microbatch, prompts // config.learner.minibatches
    if micro and mini % micro:
        raise InputError(
            f"learner.prompts_per_microbatch={micro} must divide rollout.prompts_per_step / learner.minibatches={mini}"
        )
    check_rewards(config.rewards)
    check_learner(config)
    if config.run.evaluate_every and not config.data.test:
        raise InputError(f"run.evaluate_every={config.run.evaluate_every} needs clips in data.test")
    if config.chain.frames % 2:
        raise InputError(f"chain.frames={config.chain.frames} must be even: the policy fuses frames in pairs")


def check_rewards(rewards: RewardsConfig) -> None:
    """The part of `check` that is about the weights of the rewards."""
    weights = {name: getattr(rewards, name) for name in ("format", "temporal", "spatial")}
    for name, weight in weights.items():
        if weight is not None and rewards.preset != "custom":
            raise InputError(
                f"rewards.{name}={weight:g} is read with rewards.preset=custom only, and {rewards.preset} has its own: "
                f"choose custom, or rewards.{name}=null"
            )
        if weight is not None and not weight >= 0:
            raise InputError(f"rewards.{name}={weight:g} must not be negative")
    if rewards.preset == "custom" and not any(weights.values()) and not rewards.mask:
        raise InputError("rewards.preset=custom without any weight: give rewards.format, temporal, spatial or mask")


def check_learner(config: Config) -> None:
    """The part of `check` that is about updates."""
    learner = config.learner
    for key, value in (("discount", learner.ppo.discount), ("gae_lambda", learner.ppo.gae_lambda)):
        if not 0 <= value <= 1:
            raise InputError(f"learner.ppo.{key}={value} must lie between 0 and 1")
    if learner.dual_clip and learner.dual_clip <= 1:
        raise InputError(f"learner.dual_clip={learner.dual_clip} must be above 1, or 0 for none")
    if learner.algorithm == "grpo" and config.rollout.group_size < 2:
        raise InputError("rollout.group_size=1: grpo compares the rollouts of a group and needs at least 2")
    if config.rollout.resample_limit and config.rollout.group_size < 2:
        raise InputError("rollout.resample_limit: a group of one rollout never has spread; raise rollout.group_size")
    if learner.algorithm == "ppo":
        for key, value in (("advantage", learner.advantage), ("credit", learner.credit)):
            if value != getattr(LearnerConfig, key):
                raise InputError(f"learner.{key}={value} is a choice of grpo: ppo estimates advantages with its critic")


def check_training(config: Config) -> None:
    """What works in evaluation and not in training. Raises InputError."""
    if not config.rollout.temperature or config.rollout.top_k == 1:
        key = "rollout.top_k=1" if config.rollout.temperature else "rollout.temperature=0"
        raise InputError(f"{key}: the rollouts of a group would be the same, and training learn nothing from them")
    shortest = min((config.chain.turn1_tokens, config.chain.turn2_tokens)[: config.chain.turns])
    if config.rewards.overlong_tokens > shortest:  # of the policy's own chain, which is read after the config
        raise InputError(
            f"rewards.overlong_tokens={config.rewards.overlong_tokens} must not be above the shortest answer limit "
            f"{shortest}"
        )
    if config.policy.param_dtype != "float32":
        raise InputError(
            f"policy.param_dtype={config.policy.param_dtype}: steps as small as learner.learning_rate vanish in its "
            "rounding; training keeps parameters in float32 (policy.dtype=bfloat16 computes in bfloat16)"
        )


def to_yaml(config: object) -> str:
    """The YAML text of a config dataclass, readable by `load_config` (or `OmegaConf.load` for a part of it)."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
