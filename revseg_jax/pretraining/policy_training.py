"""`revseg make-assets policy`: trains the tiny embedded policy from scratch on synthetic clips, on a CPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.serialization import msgpack_restore, msgpack_serialize
from tqdm import tqdm

from revseg_jax.config import ChainConfig
from revseg_jax.data.synthetic import render
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy, load_tokenizer, save_policy
from revseg_jax.policy.config import ModelConfig, TextConfig, VisionConfig
from revseg_jax.policy.embedded_tokenizer import build_tokenizer, write_preprocessor
from revseg_jax.pretraining.examples import ExampleMaker, batches
from revseg_jax.pretraining.learner import Learner, conversation_loss
from revseg_jax.pretraining.primitives import corpus

DIFFICULTY = "easy"
CORPUS_SCENES = 300  # that the tokenizer's vocabulary is learned from


@dataclass(frozen=True)
class Stage:
    """Attributes:
    suffixes: (whole chains, boxes on a frame, questions on the video, queries' meanings) for every clip of a step
    slots: tokens a suffix has room for
    peak: the largest learning rate of the matrices
    frames: how many frames the steps show, in turns; none: as many as the chain's config says, in all steps
    """

    name: str
    steps: int
    clips: int
    suffixes: tuple[int, int, int, int]
    slots: int
    peak: float
    frames: tuple[int, ...] = ()


# Finding a named thing and telling where it is takes about 100,000 boxes before it works at all. So boxes alone come
# first: an image and its questions cost about a seventh of a clip with its conversations. What queries about motion
# mean is learnt only when things are found by name in the video too: 2,200 steps of it straight after the boxes taught
# nothing. Then it takes some 5,000 clips to break out, best with short conversations. After the chains, whose keyframes
# are random, nothing is left of telling where a thing is biggest (0.2 right, of 8 frames), and reinforcement learning
# then finds no better keyframes either: the next stage brings it back (0.87). A policy that has always seen 8 frames
# breaks the format when it is shown 6 or 10: hence the last one.
STAGES = (
    Stage("boxes", 1400, 8, (0, 4, 0, 0), 140, 6e-3),
    Stage("conversations", 3000, 8, (1, 1, 1, 1), 240, 5e-3),
    Stage("meanings", 1300, 8, (0, 1, 0, 1), 160, 4e-3),
    Stage("chains", 1100, 8, (3, 0, 0, 1), 240, 3e-3),
    Stage("keyframes", 800, 8, (3, 0, 1, 1), 240, 3e-3),
    Stage("counts", 800, 8, (3, 0, 1, 1), 256, 3e-3, frames=(8, 6, 8, 10)),
)


def named_stages(names: str) -> tuple[Stage, ...]:
    """The stages of a comma-separated list, in the order in which they stand above; all for an empty one."""
    known = {stage.name: stage for stage in STAGES}
    wanted = names.split(",") if names else list(known)
    if unknown := set(wanted) - set(known):
        raise InputError(f"no stage is called {', '.join(sorted(unknown))}: they are {', '.join(known)}")
    return tuple(stage for name, stage in known.items() if name in wanted)


def tiny_model(tokenizer) -> ModelConfig:
    """Sizes of the embedded policy: about 1.7 million parameters."""
    token = tokenizer.convert_tokens_to_ids
    vision = VisionConfig(
        depth=3,
        hidden_size=96,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=128,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=168,
        fullatt_block_indexes=(2,),
        tokens_per_second=2,
    )
    text = TextConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        # mRoPE hands out frequencies from fast to slow to time, height and width. With equal shares and the usual base,
        # 6 columns would turn width's by 0.02 radians, and this model has no other way to tell where something is;
        # with a small base no slow frequency is left for finding things by their content.
        rope_theta=3000.0,
        mrope_section=(2, 3, 11),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    return ModelConfig(
        vision=vision,
        text=text,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices, AdamW for embeddings, norms and biases."""
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 4), steps, peak * 0.02)

    def matrices(params):
        def axes(path, leaf):
            name = jax.tree_util.keystr(path)
            if "kernel" not in name or any(head in name for head in ("dense", "located", "history")):
                return None
            first = 1 if "blocks" in name or "layers" in name else 0  # stacked kernels have a leading layer axis
            last = leaf.ndim - 1
            if "proj" in name or "out" in name:  # [layers, heads, head_dim, width]
                return optax.contrib.MuonDimensionNumbers((first, first + 1), (last,))
            return optax.contrib.MuonDimensionNumbers((first,), tuple(range(first + 1, last + 1)))

        return jax.tree_util.tree_map_with_path(axes, params)

    muon = optax.contrib.muon(
        schedule,
        weight_decay=0.01,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
        adam_b2=0.98,
        adam_learning_rate=lambda count: schedule(count) / 3,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train_stage(learner: Learner, maker: ExampleMaker, stage: Stage) -> Learner:
    """The learner after the stage's updates on the stage's conversations."""
    counts = stage.frames or (maker.chain.frames,)
    makers = [replace(maker, chain=replace(maker.chain, frames=count)) for count in counts]
    graphdef, params = nnx.split(learner)
    prefixes = [(jnp.asarray(maker.prefix_tokens), jnp.asarray(maker.prefix_positions)) for maker in makers]
    tx = optimizer(stage.peak, stage.steps)
    state = jax.jit(tx.init)(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, batch, prefix):
        def loss(params):
            return conversation_loss(nnx.merge(graphdef, params), batch, *prefix)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics

    clips = -(-stage.steps // len(makers)) * stage.clips  # of every maker, at most; each has its own
    data = [batches(maker, clips, stage.clips, turn * clips) for turn, maker in enumerate(makers)]
    bar = tqdm(range(stage.steps), desc=stage.name, mininterval=5)
    for step in bar:
        turn = step % len(makers)
        params, state, metrics = update(params, state, next(data[turn]), prefixes[turn])
        if step % 20 == 0:
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in metrics.items()})
    return nnx.merge(graphdef, params)


def train_policy(
    out: Path, chain: ChainConfig, seed: int, stages: Sequence[Stage] = STAGES, start: Path | None = None
) -> None:
    """Makes the tokenizer and the policy and writes them to the new folder `out` in Hugging Face layout.

    start: a policy folder to go on from, with its tokenizer, instead of from nothing. Weights are stored as float16,
    which halves the files. Beside it `OUT.stages` keeps the learner after every stage until the policy is written:
    killed and started again, the command goes on from there.
    """
    finished = out.with_name(f"{out.name}.stages")
    finished.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if start:
            loaded = load_policy(start)
            tokenizer, model, files = loaded.tokenizer, loaded.policy.config, start
        else:
            scenes = [render(index, DIFFICULTY, "train") for index in range(CORPUS_SCENES)]
            build_tokenizer(corpus(scenes, chain, seed), Path(folder))
            tokenizer, files = load_tokenizer(Path(folder)), Path(folder)
            model = tiny_model(tokenizer)
            write_preprocessor(model.vision, files)
        learner = Learner(model, rngs=nnx.Rngs(seed))
        if start:
            nnx.update(learner.policy, nnx.state(loaded.policy))
        for number, stage in enumerate(stages):
            saved = finished / f"{seed}_{number}_{stage.name}_{stage.steps}.msgpack"
            if saved.exists():
                restore_learner(learner, saved)
                continue
            draws = seed * len(stages) + number  # every stage sees clips of its own
            maker = ExampleMaker(tokenizer, model, chain, DIFFICULTY, stage.suffixes, stage.slots, draws)
            learner = train_stage(learner, maker, stage)
            keep_learner(learner, saved)
        save_policy(learner.policy, out, source_folder=files, chain=chain, dtype="float16")
    shutil.rmtree(finished)


def keep_learner(learner: Learner, path: Path) -> None:
    """Writes the learner's parameters; `path` appears when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(msgpack_serialize(nnx.to_pure_dict(nnx.state(learner, nnx.Param))))
    unfinished.rename(path)


def restore_learner(learner: Learner, path: Path) -> None:
    state = nnx.state(learner, nnx.Param)
    nnx.replace_by_pure_dict(state, msgpack_restore(path.read_bytes()))
    nnx.update(learner, state)
