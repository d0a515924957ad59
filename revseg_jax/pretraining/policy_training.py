"""`revseg make-assets policy`: trains the tiny embedded policy from scratch on synthetic clips, on a CPU.

First the vision tower alone learns to tell what stands at each patch, then everything learns from conversations.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from revseg_jax.config import ChainConfig
from revseg_jax.data.synthetic import COLOURS, render
from revseg_jax.policy.checkpoint import load_tokenizer, save_policy
from revseg_jax.policy.config import ModelConfig, TextConfig, VisionConfig
from revseg_jax.policy.embedded_tokenizer import build_tokenizer, write_preprocessor
from revseg_jax.policy.layers import Linear
from revseg_jax.policy.model import Policy, chunked_logprobs
from revseg_jax.policy.rope import sequence_positions
from revseg_jax.pretraining.examples import DENSE_CLASSES, ExampleMaker, batches
from revseg_jax.pretraining.primitives import corpus

DIFFICULTY = "easy"
VISION_STEPS, STEPS = 160, 600  # of the shipped policy
CORPUS_SCENES = 300  # that the tokenizer's vocabulary is learned from
CLIPS = 8  # a step
SUFFIXES = (1, 2, 1)  # whole chains, boxes on a frame, questions on the video, for every clip
SLOTS = 208  # tokens a suffix has room for
DENSE_WEIGHT, LOCATED_WEIGHT = 0.2, 0.4  # of the auxiliary losses while conversations are trained
LOCATED_LAYER = 2  # the third of four: two layers to find out where things are, two to tell


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
        num_kv_heads=2,
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


class Learner(nnx.Module):
    """The policy with two auxiliary heads that are thrown away afterwards.

    `dense` reads the vision tower's features: what stands here, and how far its edges are. `located` reads what the
    decoder's other tokens see of a visual token, its values at `LOCATED_LAYER`: what stands here, and where in the
    picture. The tower cannot know the second (its positions are relative), and a decoder of this size does not find
    out within an hour how to tell it from rotary offsets unless it is asked directly.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.policy = Policy(config, rngs=rngs)
        vision = config.vision
        self.cells = vision.temporal_patch_size * vision.spatial_merge_size**2
        outputs = self.cells * (DENSE_CLASSES + 4)
        self.dense = Linear((vision.out_hidden_size, outputs), (outputs,), rngs=rngs)
        value_width = config.text.num_kv_heads * config.text.head_dim
        self.located = Linear((value_width, outputs), (outputs,), rngs=rngs)

    def patch_loss(self, head: Linear, features: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        """features [B, slices * tokens, width]; labels of the slices' frames [B, slices * temporal, patches(, 4)]."""
        merged = self.policy.config.vision.spatial_merge_size**2
        batch, frames, patches = labels["colour"].shape
        temporal = self.cells // merged

        def arrange(label: jax.Array) -> jax.Array:
            shape = (batch, frames // temporal, temporal, patches // merged, merged, *label.shape[3:])
            return jnp.moveaxis(label.reshape(shape), 2, 3)  # [B, slices, tokens, temporal, merged, ...]

        colour, shape, box = (arrange(labels[name]) for name in ("colour", "shape", "box"))
        outputs = head("btd,do->bto", features).reshape(*colour.shape, DENSE_CLASSES + 4)
        colours, shapes, boxes = jnp.split(outputs, [len(COLOURS) + 1, DENSE_CLASSES], axis=-1)
        found = (colour < len(COLOURS)).astype(jnp.float32)
        weight = found + 0.2 * (1 - found)  # objects cover few patches
        loss = optax.softmax_cross_entropy_with_integer_labels(colours, colour)
        loss += optax.softmax_cross_entropy_with_integer_labels(shapes, shape)
        distance = jnp.abs(boxes - box).sum(-1) * 4.0 * found
        return ((loss * weight).sum() + distance.sum()) / weight.sum()


def patch_labels(batch: dict[str, jax.Array], kind: str, box: str) -> dict[str, jax.Array]:
    """Labels of the batch's videos or images for `Learner.patch_loss`; box: "edges" or "place"."""
    labels = {"colour": batch[f"{kind}_colour"], "shape": batch[f"{kind}_shape"], "box": batch[f"{kind}_{box}"]}
    if kind == "video":
        return labels
    # An image is its own temporal pair: both halves of the patch see the same frame.
    return {name: jnp.repeat(label.reshape(-1, 1, *label.shape[2:]), 2, 1) for name, label in labels.items()}


def features_and_dense_loss(learner: Learner, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features of the videos [B, V, hidden] and of the images [B, I, K, hidden], and the auxiliary loss over both."""
    prompts, images = batch["images"].shape[:2]
    video = learner.policy.encode(batch["frames"])
    image = learner.policy.encode(batch["images"].reshape(prompts * images, *batch["images"].shape[2:]))
    loss = learner.patch_loss(learner.dense, video, patch_labels(batch, "video", "edges"))
    loss += learner.patch_loss(learner.dense, image, patch_labels(batch, "image", "edges"))
    return video, image.reshape(prompts, images, *image.shape[1:]), loss


def conversation_loss(
    learner: Learner, batch: dict[str, jax.Array], prefix_tokens: jax.Array, prefix_positions: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    video, image, dense = features_and_dense_loss(learner, batch)
    policy, tokens = learner.policy, batch["tokens"]
    prompts, suffixes = tokens.shape[:2]
    length = prefix_tokens.shape[0]
    prefix = policy.prefill(
        jnp.broadcast_to(prefix_tokens, (prompts, length)),
        jnp.broadcast_to(prefix_positions[:, None], (3, prompts, length)),
        jnp.ones((prompts, length), bool),
        video,
    )
    x = policy.embed(tokens, jnp.pad(image, ((0, 0), (0, suffixes - image.shape[1]), (0, 0), (0, 0))))
    visible = jnp.tril(jnp.ones((tokens.shape[2],) * 2, bool)) & batch["mask"][:, :, None, :]
    hidden, _, values = policy.text(x, jnp.moveaxis(batch["positions"], 1, 0), visible, prefix)
    located = located_loss(learner, batch, prefix_tokens, prefix.value[LOCATED_LAYER], values[LOCATED_LAYER])
    logprobs, _ = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], 2048)
    trained = batch["trained"][:, :, 1:]
    loss = -(logprobs * trained).sum() / trained.sum()
    total = loss + DENSE_WEIGHT * dense + LOCATED_WEIGHT * located
    return total, {"loss": loss, "dense": dense, "located": located}


def located_loss(
    learner: Learner, batch: dict[str, jax.Array], prefix_tokens: jax.Array, prefix: jax.Array, suffix: jax.Array
) -> jax.Array:
    """The auxiliary loss on the decoder's values: prefix [B, P, heads, width], suffix [B, G, S, heads, width]."""
    config = learner.policy.config
    merged = config.vision.spatial_merge_size**2
    count = batch["video_colour"].shape[1] * batch["video_colour"].shape[2] // learner.cells
    first = jnp.argmax(prefix_tokens == config.video_token_id)
    video = jax.lax.dynamic_slice_in_dim(prefix, first, count, axis=1).reshape(len(prefix), count, -1)

    prompts, images, patches = batch["image_colour"].shape
    starts = jnp.argmax(batch["tokens"][:, :images] == config.image_token_id, axis=-1).reshape(-1)
    shown = suffix[:, :images].reshape(prompts * images, suffix.shape[2], -1)
    image = jax.vmap(lambda values, start: jax.lax.dynamic_slice_in_dim(values, start, patches // merged))(
        shown, starts
    )
    loss = learner.patch_loss(learner.located, video, patch_labels(batch, "video", "place"))
    return loss + learner.patch_loss(learner.located, image, patch_labels(batch, "image", "place"))


def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices, AdamW for embeddings, norms and biases."""
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 4), steps, peak * 0.02)

    def matrices(params):
        def axes(path, leaf):
            name = jax.tree_util.keystr(path)
            if "kernel" not in name or "dense" in name or "located" in name:
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


def train_stage(loss_fn, learner: Learner, data, steps: int, peak: float, label: str, save=None) -> Learner:
    """Runs `steps` updates of loss_fn(learner, batch) -> (loss, metrics) and returns the trained learner.

    `save(learner)` is called every 100 steps: a training of an hour should leave something behind when it is stopped.
    """
    graphdef, params = nnx.split(learner)
    tx = optimizer(peak, steps)
    state = jax.jit(tx.init)(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, batch):
        def loss(params):
            return loss_fn(nnx.merge(graphdef, params), batch)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics

    bar = tqdm(range(steps), desc=label, mininterval=5)
    for step in bar:
        params, state, metrics = update(params, state, next(data))
        if step % 20 == 0:
            bar.set_postfix({name: f"{float(value):.3f}" for name, value in metrics.items()})
        if save and step and step % 100 == 0:
            save(nnx.merge(graphdef, params))
    return nnx.merge(graphdef, params)


def train_policy(
    out: Path, chain: ChainConfig, seed: int, vision_steps: int = VISION_STEPS, steps: int = STEPS
) -> None:
    """Makes the tokenizer and the policy and writes them to `out` in Hugging Face layout."""
    scenes = [render(index, DIFFICULTY, "train") for index in range(CORPUS_SCENES)]
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(corpus(scenes, chain, seed), Path(folder))
        tokenizer = load_tokenizer(Path(folder))
        model = tiny_model(tokenizer)
        write_preprocessor(model.vision, Path(folder))
        maker = ExampleMaker(tokenizer, model, chain, DIFFICULTY, SUFFIXES, SLOTS, seed)
        prefix = jnp.asarray(maker.prefix_tokens)
        positions = jnp.asarray(
            sequence_positions(maker.prefix_tokens, model, [maker.video_grid()], [maker.seconds_per_grid()])
        )

        def vision_loss(learner: Learner, batch):
            dense = features_and_dense_loss(learner, batch)[2]
            return dense, {"dense": dense}

        def talk_loss(learner: Learner, batch):
            return conversation_loss(learner, batch, prefix, positions)

        def save(learner: Learner) -> None:
            shutil.rmtree(out, ignore_errors=True)
            save_policy(learner.policy, out, source_folder=Path(folder), chain=chain)

        data = batches(maker, (vision_steps + steps + 1) * CLIPS, CLIPS)
        learner = Learner(model, rngs=nnx.Rngs(seed))
        learner = train_stage(vision_loss, learner, data, vision_steps, 1e-2, "vision tower")
        learner = train_stage(talk_loss, learner, data, steps, 6e-3, "conversations", save)
        save(learner)
