"""Qwen2.5-VL's vision tower: patches -> one feature per merged patch.

Every attention of the tower stays inside one temporal slice (two fused frames, or one image). Most blocks attend inside
square windows of a slice; the host lays the patches out window by window once (`WindowLayout`), so that window
attention is a reshape of [rows, windows * slots, ...] and full attention only has to skip the padding. A row is one
slice when all have the same size (`__call__`), or several smaller ones side by side (`packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from revseg_jax.parallel.sharding import constrain
from revseg_jax.policy.attention import AttentionChoice, attention, windowed_attention
from revseg_jax.policy.config import VisionConfig
from revseg_jax.policy.layers import GatedMLP, Linear, RMSNorm, stack_layers
from revseg_jax.policy.remat import BLOCK_INPUT, rematerialised
from revseg_jax.policy.rope import merge_order, rotate, vision_angles


@dataclass(frozen=True)
class WindowLayout:
    """Where each patch of a (height, width) grid sits when patches are laid out window by window.

    Attributes:
      gather: int [windows * slots], index of the patch (merge order) in each slot; padding slots repeat patch 0.
      real: bool [windows, slots], False in padding slots (windows at the border of an uneven grid are smaller).
      scatter: int [height * width / merge^2], slot group of each merged patch, to undo the layout after merging.
      places: int [windows * slots, 2], row and column of each slot's patch in the grid.
    """

    gather: np.ndarray
    real: np.ndarray
    scatter: np.ndarray
    places: np.ndarray


@lru_cache(maxsize=64)
def window_layout(vision: VisionConfig, height: int, width: int) -> WindowLayout:
    """height, width: the grid in patches, both divisible by the merge size."""
    merge = vision.spatial_merge_size
    side = vision.window_side
    merged_height, merged_width = height // merge, width // merge
    windows = [
        [
            row * merged_width + column
            for row in range(top, min(top + side, merged_height))
            for column in range(left, min(left + side, merged_width))
        ]
        for top in range(0, merged_height, side)
        for left in range(0, merged_width, side)
    ]
    slots = max(map(len, windows))
    groups = np.full((len(windows), slots), -1)
    for number, window in enumerate(windows):
        groups[number, : len(window)] = window
    patches = merge * merge
    gather = (np.maximum(groups, 0)[..., None] * patches + np.arange(patches)).reshape(-1)
    real = np.repeat(groups >= 0, patches, axis=1)
    flat = groups.reshape(-1)
    scatter = np.empty(merged_height * merged_width, np.int64)
    scatter[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    places = np.stack(merge_order(height, width, merge), axis=-1)[gather]
    return WindowLayout(gather, real, scatter, places)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.norm1 = RMSNorm(width, 1e-6)
        self.norm2 = RMSNorm(width, 1e-6)
        self.qkv = Linear((width, 3, heads, head_dim), (3, heads, head_dim), rngs=rngs)
        self.proj = Linear((heads, head_dim, width), (width,), rngs=rngs)
        self.mlp = GatedMLP(width, config.intermediate_size, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Callable) -> jax.Array:
        """x [rows, slots, width]; cos, sin [rows or 1, slots, head_dim]; `attend(query, key, value)` takes and returns
        [rows, slots, heads, head_dim]."""
        query, key, value = self.qkv.parts("nsd,dhk->nshk", self.norm1(x))
        mixed = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + self.proj("nshk,hkd->nsd", mixed)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Joins each merge x merge square of patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        wide = config.hidden_size * config.spatial_merge_size**2
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.fc1 = Linear((wide, wide), (wide,), rngs=rngs)
        self.fc2 = Linear((wide, config.out_hidden_size), (config.out_hidden_size,), rngs=rngs)
        self.wide = wide

    def __call__(self, x: jax.Array) -> jax.Array:
        """[rows, patches, hidden] in merge order -> [rows, patches / merge^2, out_hidden]."""
        squares = self.norm(x).reshape(x.shape[0], -1, self.wide)
        inner = jax.nn.gelu(self.fc1("mtd,df->mtf", squares), approximate=False)
        return self.fc2("mtf,fd->mtd", inner)


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, attention: AttentionChoice):
        self.config = config
        self.attention = attention
        self.patch_embed = Linear((config.patch_dim, config.hidden_size), rngs=rngs)
        self.blocks = stack_layers(lambda layer_rngs: VisionBlock(config, rngs=layer_rngs), config.depth, rngs)
        self.merger = PatchMerger(config, rngs=rngs)

    def __call__(self, patches: jax.Array, height: int, width: int, remat: str = "none") -> jax.Array:
        """patches [slices, height * width, patch_dim] in merge order -> [slices, height * width / merge^2, out_hidden].

        height, width: the grid in patches, static. `patches` come from `revseg_jax.policy.preprocess.patchify`.
        """
        layout = window_layout(self.config, height, width)
        angles = vision_angles(self.config, layout.places)
        # Said before the first block too: the compiler would rather spread the patches' pixels over the devices.
        patches = constrain(self.attention.placement, patches, "prompts")
        x = constrain(self.attention.placement, self.patch_embed("mtp,pd->mtd", patches), "prompts")[:, layout.gather]
        segments = None if layout.real.all() else layout.real[None].astype(np.int32)
        x = self._run_blocks(x, np.cos(angles)[None], np.sin(angles)[None], segments, len(layout.real), remat)
        return self.merger(x)[:, layout.scatter]

    def packed(self, patches: jax.Array, places: jax.Array, segments: jax.Array, remat: str = "none") -> jax.Array:
        """Slices of any sizes, laid out window by window and several to a row: nothing but array shapes is static.

        patches [rows, windows, slots, patch_dim]; places int32 [rows, windows, slots, 2], row and column in the
        slice's grid; segments int32 [rows, windows, slots], the slice of its row that a slot belongs to, 0 for padding.
        Returns [rows, windows * slots / merge^2, out_hidden] in the same layout.
        """
        angles = vision_angles(self.config, places.reshape(len(places), -1, 2))
        x = self.patch_embed("mtp,pd->mtd", patches.reshape(len(patches), -1, patches.shape[-1]))
        return self.merger(self._run_blocks(x, jnp.cos(angles), jnp.sin(angles), segments, segments.shape[1], remat))

    def _run_blocks(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, segments: jax.Array | None, windows: int, remat: str
    ) -> jax.Array:
        """x [rows, windows * slots, width]; cos, sin [rows or 1, windows * slots, head_dim]; segments int32 [rows or 1,
        windows, slots], None where a row is one slice without padding. Returns the same shape as x."""
        if segments is not None:
            segments = jnp.broadcast_to(segments.reshape(len(segments), -1), x.shape[:2])
        graphdef, stacked = nnx.split(self.blocks)
        is_full = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)

        def block(x: jax.Array, layer: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
            state, full = layer

            def attend(*parts: jax.Array) -> jax.Array:
                if windows == 1:
                    return attention(*parts, segments, choice=self.attention)[0]
                return windowed_attention(*parts, segments, full, windows, self.attention)

            return nnx.merge(graphdef, state)(x, cos, sin, attend), None

        def marked(x: jax.Array) -> jax.Array:
            # What is kept of a condition's branch comes together on each device, unless it is spread behind the mark.
            return constrain(self.attention.placement, checkpoint_name(x, BLOCK_INPUT), "prompts")

        run = rematerialised(block, remat)
        x, _ = jax.lax.scan(lambda x, layer: run(marked(x), layer), x, (stacked, jnp.asarray(is_full)))
        return marked(x)
