"""The policy in supervised training: auxiliary heads beside it, and the loss over one batch of conversations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from revseg_jax.data.synthetic import COLOURS
from revseg_jax.data.synthetic.queries import TEMPLATES
from revseg_jax.policy.attention_plain import shared_prefix_attention
from revseg_jax.policy.config import ModelConfig
from revseg_jax.policy.layers import Linear
from revseg_jax.policy.model import Policy, PrefixTokens, chunked_logprobs
from revseg_jax.policy.rope import decoder_rotation
from revseg_jax.policy.text import Decoder, Prefix
from revseg_jax.pretraining.examples import PATCH_CLASSES
from revseg_jax.pretraining.history import FACTS
from revseg_jax.pretraining.pointing import pointing_loss, shown_objects

DENSE_WEIGHT, LOCATED_WEIGHT, FACTS_WEIGHT, ANSWERS_WEIGHT = 0.2, 0.4, 0.4, 0.8  # of the auxiliary losses
POINTED_WEIGHT = 0.3
LOCATED_LAYER = 2  # the third of four: two layers to find out where things are, two to tell
FOLLOWED_LAYER = 3  # where what things do over time is known, and where the one meant is looked for


class Learner(nnx.Module):
    """The policy with three auxiliary heads that are thrown away afterwards.

    `dense` reads the vision tower's features: what stands here, and how far its edges are. `located` reads what the
    decoder's other tokens see of a visual token, its values at `LOCATED_LAYER`: what stands here, and where in the
    picture. The tower cannot know the second (its positions are relative), and a decoder of this size does not find
    out within an hour how to tell it from rotary offsets unless it is asked directly. `history` reads the values at
    `FOLLOWED_LAYER`: what the thing that stands here has done so far, and which questions it answers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.policy = Policy(config, rngs=rngs)
        vision = config.vision
        self.cells = vision.temporal_patch_size * vision.spatial_merge_size**2
        outputs = self.cells * (PATCH_CLASSES + 4)
        self.dense = Linear((vision.out_hidden_size, outputs), (outputs,), rngs=rngs)
        value_width = config.text.num_kv_heads * config.text.head_dim
        self.located = Linear((value_width, outputs), (outputs,), rngs=rngs)
        outputs = self.cells * (FACTS + len(TEMPLATES))
        self.history = Linear((value_width, outputs), (outputs,), rngs=rngs)

    def arrange(self, label: jax.Array) -> jax.Array:
        """[B, frames, patches, ...] as [B, slices, tokens, temporal, merged, ...], as the heads' outputs are."""
        merged = self.policy.config.vision.spatial_merge_size**2
        batch, frames, patches = label.shape[:3]
        temporal = self.cells // merged
        shape = (batch, frames // temporal, temporal, patches // merged, merged, *label.shape[3:])
        return jnp.moveaxis(label.reshape(shape), 2, 3)

    def patch_loss(self, head: Linear, features: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
        """features [B, slices * tokens, width]; labels of the slices' frames [B, slices * temporal, patches(, 4)]."""
        colour, shape, box = (self.arrange(labels[name]) for name in ("colour", "shape", "box"))
        outputs = head("btd,do->bto", features).reshape(*colour.shape, PATCH_CLASSES + 4)
        colours, shapes, boxes = jnp.split(outputs, [len(COLOURS) + 1, PATCH_CLASSES], axis=-1)
        found = (colour < len(COLOURS)).astype(jnp.float32)
        weight = found + 0.2 * (1 - found)  # objects cover few patches
        loss = optax.softmax_cross_entropy_with_integer_labels(colours, colour)
        loss += optax.softmax_cross_entropy_with_integer_labels(shapes, shape)
        distance = jnp.abs(boxes - box).sum(-1) * 4.0 * found
        return ((loss * weight).sum() + distance.sum()) / weight.sum()

    def history_loss(self, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(mean distance from the facts, mean cross-entropy of the answers); features as in `patch_loss`."""
        colour, facts, answers = (self.arrange(batch[f"video_{name}"]) for name in ("colour", "facts", "answers"))
        outputs = self.history("btd,do->bto", features).reshape(*colour.shape, FACTS + len(TEMPLATES))
        told, logits = jnp.split(outputs, [FACTS], axis=-1)
        found, asked = colour < len(COLOURS), answers >= 0
        distance = (jnp.abs(told - facts).sum(-1) * found).sum() / jnp.maximum(found.sum(), 1)
        wrong = optax.sigmoid_binary_cross_entropy(logits, answers.astype(logits.dtype)) * asked
        return distance, wrong.sum() / jnp.maximum(asked.sum(), 1)


def labels_of(batch: dict[str, jax.Array], kind: str, box: str) -> dict[str, jax.Array]:
    """Labels of the batch's videos ("video") or images ("image") for `patch_loss`; box: "edges" or "place"."""
    labels = {"colour": batch[f"{kind}_colour"], "shape": batch[f"{kind}_shape"], "box": batch[f"{kind}_{box}"]}
    if kind == "video":
        return labels
    # An image is its own temporal pair: both halves of the patch see the same frame.
    return {name: jnp.repeat(label.reshape(-1, 1, *label.shape[2:]), 2, 1) for name, label in labels.items()}


def conversation_loss(
    learner: Learner, batch: dict[str, jax.Array], prefix_tokens: jax.Array, prefix_positions: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood of the answers' tokens plus the auxiliary losses, and each of them by name.

    batch: of `ExampleMaker`, with a leading axis B; prefix_tokens int32 [P] and prefix_positions int32 [3, P].
    """
    policy, tokens = learner.policy, batch["tokens"]
    prompts, suffixes, slots = tokens.shape
    images, length = batch["images"].shape[1], len(prefix_tokens)
    features = {"image": policy.encode(batch["images"].reshape(prompts * images, *batch["images"].shape[2:]))}
    if "frames" in batch:
        features["video"] = policy.encode(batch["frames"])
    before = PrefixTokens(
        jnp.broadcast_to(prefix_tokens, (prompts, length)),
        jnp.broadcast_to(prefix_positions[:, None], (3, prompts, length)),
        jnp.ones((prompts, length), bool),
        features.get("video"),
    )
    prefix = policy.prefill(before)
    shown = features["image"].reshape(prompts, images, *features["image"].shape[1:])
    x = policy.embed(tokens, jnp.pad(shown, ((0, 0), (0, suffixes - images), (0, 0), (0, 0))))
    visible = jnp.tril(jnp.ones((slots, slots), bool)) & batch["mask"][:, :, None, :]
    hidden, queries, keys, values = run_suffixes(
        policy.text, x, jnp.moveaxis(batch["positions"], 1, 0), visible, prefix
    )

    logprobs, _ = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], 2048)
    trained = batch["trained"][:, :, 1:]
    loss = -(logprobs * trained).sum() / trained.sum()
    dense = sum(learner.patch_loss(learner.dense, features[kind], labels_of(batch, kind, "edges")) for kind in features)

    own = values[LOCATED_LAYER][:, :images].reshape(prompts * images, slots, -1)
    seen = {"image": visual_values(own, tokens[:, :images], learner.policy.config.image_token_id, features["image"])}
    if "video" in features:
        shown_tokens = jnp.broadcast_to(prefix_tokens, (prompts, length))

        def of_video(cached: jax.Array) -> jax.Array:
            wide = cached.reshape(prompts, length, -1)
            return visual_values(wide, shown_tokens, learner.policy.config.video_token_id, features["video"])

        seen["video"] = of_video(prefix.value[LOCATED_LAYER])
    located = sum(learner.patch_loss(learner.located, seen[kind], labels_of(batch, kind, "place")) for kind in seen)
    total = loss + DENSE_WEIGHT * dense + LOCATED_WEIGHT * located
    metrics = {"loss": loss, "dense": dense, "located": located}
    if "video" in seen:
        metrics["facts"], metrics["answers"] = learner.history_loss(of_video(prefix.value[FOLLOWED_LAYER]), batch)
        start = jnp.argmax(prefix_tokens == learner.policy.config.video_token_id)
        shows = shown_objects(learner.arrange(batch["video_object"]), start, length)
        metrics["pointed"] = pointing_loss(queries, keys, prefix.key[FOLLOWED_LAYER], visible, batch["pointers"], shows)
        total += FACTS_WEIGHT * metrics["facts"] + ANSWERS_WEIGHT * metrics["answers"]
        total += POINTED_WEIGHT * metrics["pointed"]
    return total, metrics


def run_suffixes(
    decoder: Decoder, x: jax.Array, positions: jax.Array, visible: jax.Array, prefix: Prefix
) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """`decoder(x, positions, visible, prefix)` with what the losses look into.

    Returns the final-normed hidden [B, G, S, width], queries [B, G, S, H, D] and keys [B, G, S, K, D] at
    `FOLLOWED_LAYER`, and values [B, G, S, K, D] of every layer.
    """
    cos, sin = decoder_rotation(decoder.config, positions, x.dtype)
    graphdef, stacked = nnx.split(decoder.layers)
    queries, keys, values = [], [], []
    for index in range(decoder.config.num_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
        query, key, value = layer.project(x, cos, sin)
        shared = (prefix.key[index], prefix.value[index], prefix.mask)
        x = layer.finish(x, shared_prefix_attention(query, key, value, visible, shared))
        queries, keys, values = [*queries, query], [*keys, key], [*values, value]
    return decoder.norm(x), queries[FOLLOWED_LAYER], keys[FOLLOWED_LAYER], values


def visual_values(values: jax.Array, tokens: jax.Array, visual_token: int, features: jax.Array) -> jax.Array:
    """What stands in `values` [n, length, width] at the visual tokens, as many as `features` [n, count, ...] has."""
    starts = jnp.argmax(tokens.reshape(len(values), -1) == visual_token, axis=-1)
    count = features.shape[1]
    return jax.vmap(lambda value, start: jax.lax.dynamic_slice_in_dim(value, start, count))(values, starts)
