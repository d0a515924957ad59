"""The policy in supervised training: two auxiliary heads beside it, and the loss over one batch of conversations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from revseg_jax.data.synthetic import COLOURS
from revseg_jax.policy.config import ModelConfig
from revseg_jax.policy.layers import Linear
from revseg_jax.policy.model import Policy, chunked_logprobs
from revseg_jax.pretraining.examples import PATCH_CLASSES

DENSE_WEIGHT, LOCATED_WEIGHT = 0.2, 0.4  # of the auxiliary losses
LOCATED_LAYER = 2  # the third of four: two layers to find out where things are, two to tell


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
        outputs = self.cells * (PATCH_CLASSES + 4)
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
        outputs = head("btd,do->bto", features).reshape(*colour.shape, PATCH_CLASSES + 4)
        colours, shapes, boxes = jnp.split(outputs, [len(COLOURS) + 1, PATCH_CLASSES], axis=-1)
        found = (colour < len(COLOURS)).astype(jnp.float32)
        weight = found + 0.2 * (1 - found)  # objects cover few patches
        loss = optax.softmax_cross_entropy_with_integer_labels(colours, colour)
        loss += optax.softmax_cross_entropy_with_integer_labels(shapes, shape)
        distance = jnp.abs(boxes - box).sum(-1) * 4.0 * found
        return ((loss * weight).sum() + distance.sum()) / weight.sum()


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
    prefix = policy.prefill(
        jnp.broadcast_to(prefix_tokens, (prompts, length)),
        jnp.broadcast_to(prefix_positions[:, None], (3, prompts, length)),
        jnp.ones((prompts, length), bool),
        features.get("video"),
    )
    shown = features["image"].reshape(prompts, images, *features["image"].shape[1:])
    x = policy.embed(tokens, jnp.pad(shown, ((0, 0), (0, suffixes - images), (0, 0), (0, 0))))
    visible = jnp.tril(jnp.ones((slots, slots), bool)) & batch["mask"][:, :, None, :]
    hidden, _, values = policy.text(x, jnp.moveaxis(batch["positions"], 1, 0), visible, prefix)

    logprobs, _ = chunked_logprobs(policy, hidden[:, :, :-1], tokens[:, :, 1:], 2048)
    trained = batch["trained"][:, :, 1:]
    loss = -(logprobs * trained).sum() / trained.sum()
    dense = sum(learner.patch_loss(learner.dense, features[kind], labels_of(batch, kind, "edges")) for kind in features)

    own = values[LOCATED_LAYER][:, :images].reshape(prompts * images, slots, -1)
    seen = {"image": visual_values(own, tokens[:, :images], learner.policy.config.image_token_id, features["image"])}
    if "video" in features:
        seen["video"] = visual_values(
            prefix.value[LOCATED_LAYER].reshape(prompts, length, -1),
            jnp.broadcast_to(prefix_tokens, (prompts, length)),
            learner.policy.config.video_token_id,
            features["video"],
        )
    located = sum(learner.patch_loss(learner.located, seen[kind], labels_of(batch, kind, "place")) for kind in seen)
    total = loss + DENSE_WEIGHT * dense + LOCATED_WEIGHT * located
    return total, {"loss": loss, "dense": dense, "located": located}


def visual_values(values: jax.Array, tokens: jax.Array, visual_token: int, features: jax.Array) -> jax.Array:
    """What stands in `values` [n, length, width] at the visual tokens, as many as `features` [n, count, ...] has."""
    starts = jnp.argmax(tokens.reshape(len(values), -1) == visual_token, axis=-1)
    count = features.shape[1]
    return jax.vmap(lambda value, start: jax.lax.dynamic_slice_in_dim(value, start, count))(values, starts)
