"""Many box prompts through SAM2's tracking loop at once.

The `sam2` package tracks one object at a time: a small tensor through some hundred operations, for every object and
frame. Here the prompts of a clip are the batch dimension of each operation, whatever their keyframes are: a prompt
visits its keyframe, then the frames after it, then those before it, and at step s every prompt is at the s-th frame of
its own. What a prompt remembers depends on where it stands, so memories are gathered for each prompt and padded, and
the padding is masked out of the attention. The masks are those of SAM2VideoPredictor with one object a state:
`add_new_points_or_box`, `propagate_in_video`, then `propagate_in_video(reverse=True)`.

In shapes: b of B prompts, C = hidden_dim, D = mem_dim, h x w the coarsest feature map, S = image_size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.position_encoding import apply_rotary_enc
from sam2.modeling.sam2_base import SAM2Base
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor

from revseg_jax.tracker.decoding import decode_video


@dataclass(frozen=True)
class Chain:
    """The frames one prompt visits, in order: its keyframe, `forward` frames after it, `backward` frames before it."""

    keyframe: int
    forward: int
    backward: int

    def __len__(self) -> int:
        return 1 + self.forward + self.backward

    def frame(self, step: int) -> int:
        return self.keyframe + step if step <= self.forward else self.keyframe - (step - self.forward)

    def sources(self, step: int, reach: int) -> list[tuple[int, int]]:
        """What `step` remembers besides the keyframe: (distance in frames, step that visited it), farthest first.

        These are the frames 1..reach behind the current one in the direction of travel. On the way back those beyond
        the keyframe count too: they were visited on the way forward.
        """
        back = step - self.forward  # how far before the keyframe, if above 0
        found = []
        for distance in range(reach, 0, -1):
            if back > 0 and distance >= back:
                source = distance - back
                known = 1 <= source <= self.forward
            else:
                source = step - distance
                known = source >= 1
            if known:
                found.append((distance, source))
        return found

    def asked_for(self, step: int, reach: int) -> bool:
        """Whether any later step has `step` among its sources (or, for step 0, any later step exists)."""
        if step == 0:
            return len(self) > 1
        if step > self.forward:
            return reach > 0 and step + 1 < len(self)
        return reach > 0 and (step < self.forward or (self.backward > 0 and step < reach))


def plan(model: SAM2Base, total: int, keyframe: int, wanted: Collection[int] | None = None) -> Chain:
    """The shortest chain that gives the wanted frames (None: all) of a clip of `total` frames their proper masks."""
    first, last = (0, total - 1) if wanted is None else (min(wanted), max(wanted))
    backward = max(0, keyframe - first)
    # The way back looks at the first frames of the way forward.
    needed = max(_reaches(model, total)) - 1 if backward else 0
    return Chain(keyframe, min(total - 1 - keyframe, max(0, last - keyframe, needed)), backward)


def unsupported(model: SAM2Base) -> str | None:
    """The option of the model's config that this loop does not cover, or None. No published config uses one."""
    found = {
        "memory_temporal_stride_for_eval": model.memory_temporal_stride_for_eval != 1,
        "directly_add_no_mem_embed: false": not model.directly_add_no_mem_embed,
        "num_maskmem: 0": model.num_maskmem < 1,
        "fill_hole_area": getattr(model, "fill_hole_area", 0) > 0,
        "non_overlap_masks_for_mem_enc": model.non_overlap_masks_for_mem_enc,
    }
    return next((name for name, used in found.items() if used), None)


@torch.inference_mode()
def propagate(
    model: SAM2Base,
    total: int,
    features: Callable[[list[int]], list[Tensor]],
    chains: Sequence[Chain],
    boxes: Tensor,
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Yields at each step (prompts, the frame each of them is at, float32 mask logits [b, 1, S/4, S/4]).

    total: frames in the clip. features: frame indices (repeats allowed) -> the feature maps of `forward_image`, finest
    first, each [b, channels, height, width]. boxes: float32 [B, 4] xyxy in pixels of the S x S frames.
    """
    bank = _Bank(model, total, chains, boxes.device)
    for step in range(max(len(chain) for chain in chains)):
        rows = [row for row, chain in enumerate(chains) if step < len(chain)]
        frames = [chains[row].frame(step) for row in rows]
        *fine, top = features(frames)
        if step == 0:
            conditioned = top + model.no_mem_embed.view(1, -1, 1, 1)
        else:
            conditioned = bank.attend(top, rows, step)
        masks, pointers, scores = decode_video(model, conditioned, fine, boxes if step == 0 else None)
        bank.store(top, rows, step, masks, pointers, scores)
        yield rows, frames, masks


def _reaches(model: SAM2Base, total: int) -> tuple[int, int]:
    """How many frames back SAM2 looks for mask memories and for object pointers."""
    pointers = min(total, model.max_obj_ptrs_in_encoder) - 1 if model.use_obj_ptrs_in_encoder else 0
    return model.num_maskmem - 1, pointers


class _Bank:
    """What B prompts remember; its size does not grow with the clip.

    Kept are the steps that can still be asked for: the first `reach` (the way back looks at them) and the last `reach`.
    """

    def __init__(self, model: SAM2Base, total: int, chains: Sequence[Chain], device: torch.device):
        self.model, self.chains, self.device = model, chains, device
        self.memory_reach, self.pointer_reach = _reaches(model, total)
        longest, tokens = max(len(chain) for chain in chains), model.sam_image_embedding_size**2
        memory_slots, pointer_slots = (min(longest, 1 + 2 * reach) for reach in (self.memory_reach, self.pointer_reach))
        # The predictor keeps memories in bfloat16; the rounding is part of its result.
        shape = (len(chains), memory_slots, tokens, model.mem_dim)
        self.memories = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.pointers = torch.zeros(len(chains), pointer_slots, model.hidden_dim, device=device)
        self.memory_positions: Tensor | None = None  # [num_maskmem, h * w, D], by distance - 1; the last: the keyframe

    def attend(self, top: Tensor, rows: list[int], step: int) -> Tensor:
        """Feature maps [b, C, h, w] of the frames the prompts `rows` are at, conditioned on what these remember."""
        model = self.model
        at = torch.tensor(rows, device=self.device)[:, None]
        slots, distances, known = self._gather(rows, step, self.memory_reach, keyframe_distance=model.num_maskmem)
        memory = self.memories[at, slots].float()
        position = self.memory_positions[distances - 1].flatten(1, 2)
        known = known.repeat_interleave(memory.shape[2], dim=1)
        memory = memory.flatten(1, 2)
        pointer_tokens = 0
        if model.use_obj_ptrs_in_encoder:
            slots, distances, known_pointers = self._gather(rows, step, self.pointer_reach)
            split = model.hidden_dim // model.mem_dim  # a pointer is cut into tokens as wide as the memories
            pointers = self.pointers[at, slots].unflatten(-1, (split, model.mem_dim)).flatten(1, 2)
            pointer_position = self._pointer_positions(distances).repeat_interleave(split, dim=1)
            pointer_tokens = pointers.shape[1]
            memory, position = torch.cat([memory, pointers], dim=1), torch.cat([position, pointer_position], dim=1)
            known = torch.cat([known, known_pointers.repeat_interleave(split, dim=1)], dim=1)
        out = _attend_memory(
            model.memory_attention, top, self._image_position(top), memory, position, pointer_tokens, known
        )
        return out.transpose(1, 2).unflatten(2, top.shape[-2:])

    def store(self, top: Tensor, rows: list[int], step: int, masks: Tensor, pointers: Tensor, scores: Tensor) -> None:
        """Keeps what step `step` gave: mask logits [b, 1, S/4, S/4], pointers [b, C], object scores [b, 1]."""
        if step == 0 or self.pointer_reach:
            self.pointers[rows, _slot(step, self.pointer_reach)] = pointers.float()
        chosen = [n for n, row in enumerate(rows) if self.chains[row].asked_for(step, self.memory_reach)]
        if not chosen:
            return
        size = self.model.image_size
        memory, positions = self.model._encode_new_memory(
            current_vision_feats=[top[chosen].flatten(2).permute(2, 0, 1)],
            feat_sizes=[top.shape[-2:]],
            pred_masks_high_res=F.interpolate(masks[chosen], size=(size, size), mode="bilinear", align_corners=False),
            object_score_logits=scores[chosen],
            is_mask_from_pts=step == 0,
        )
        slot = _slot(step, self.memory_reach)
        self.memories[[rows[n] for n in chosen], slot] = memory.flatten(2).transpose(1, 2).to(torch.bfloat16)
        if self.memory_positions is None:  # the same for all prompts and frames
            spatial = positions[-1][:1].flatten(2).transpose(1, 2)
            self.memory_positions = spatial + self.model.maskmem_tpos_enc[:, 0]

    def _gather(
        self, rows: list[int], step: int, reach: int, keyframe_distance: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, distances and which of them are real, [b, n] each; the keyframe's comes first."""
        found = []
        for row in rows:
            chain = self.chains[row]
            distance = keyframe_distance or abs(chain.frame(step) - chain.keyframe)
            others = [(_slot(source, reach), distance) for distance, source in chain.sources(step, reach)]
            found.append([(0, distance), *others])
        width = max(len(entries) for entries in found)
        padded = torch.tensor([entries + [(0, 1)] * (width - len(entries)) for entries in found], device=self.device)
        lengths = torch.tensor([len(entries) for entries in found], device=self.device)
        known = torch.arange(width, device=self.device) < lengths[:, None]
        return padded[..., 0], padded[..., 1], known

    def _image_position(self, top: Tensor) -> Tensor:
        return self.model.image_encoder.neck.position_encoding(top[:1]).flatten(2).transpose(1, 2)

    def _pointer_positions(self, distances: Tensor) -> Tensor:
        """Temporal encodings [b, n, D] of int64 [b, n] distances."""
        model = self.model
        if not model.add_tpos_enc_to_obj_ptrs:
            return torch.zeros(*distances.shape, model.mem_dim, device=distances.device)
        width = model.hidden_dim if model.proj_tpos_enc_in_obj_ptrs else model.mem_dim
        return model.obj_ptr_tpos_proj(get_1d_sine_pe(distances / self.pointer_reach, dim=width))


def _slot(step: int, reach: int) -> int:
    """Where a bank keeps a step: the first ones for good, the later ones in a ring of `reach` slots."""
    return step if step <= reach else reach + 1 + (step - reach - 1) % reach


def _attend_memory(
    attention: torch.nn.Module,  # sam2.modeling.memory_attention.MemoryAttention
    top: Tensor,
    image_position: Tensor,
    memory: Tensor,
    memory_position: Tensor,
    pointer_tokens: int,
    known: Tensor,
) -> Tensor:
    """MemoryAttention.forward with a mask over the memories: [b, C, h, w] and [b, n, D] -> [b, h * w, C].

    image_position: [1, h * w, C]. The last `pointer_tokens` of the n memories have no place in the image. known: bool
    [b, n], False for padding.
    """
    out = top.flatten(2).transpose(1, 2)
    if attention.pos_enc_at_input:
        out = out + 0.1 * image_position
    mask = None if known.all() else known[:, None, None, :]
    for layer in attention.layers:
        out = layer._forward_sa(out, image_position)
        query = layer.norm2(out)
        if layer.pos_enc_at_cross_attn_queries:
            query = query + image_position
        key = memory + memory_position if layer.pos_enc_at_cross_attn_keys else memory
        out = out + _rotary_attention(layer.cross_attn_image, query, key, memory, pointer_tokens, mask)
        out = out + layer.linear2(layer.activation(layer.linear1(layer.norm3(out))))
    return attention.norm(out)


def _rotary_attention(
    attention: torch.nn.Module,  # sam2.modeling.sam.transformer.RoPEAttention
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unrotated: int,
    mask: Tensor | None,
) -> Tensor:
    """RoPEAttention.forward with a mask; the last `unrotated` keys are left as they are."""
    query, key, value = (
        attention._separate_heads(project(tokens), attention.num_heads)
        for project, tokens in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value))
    )
    side = int(query.shape[-2] ** 0.5)
    angles = attention.freqs_cis.to(query.device)
    if angles.shape[0] != query.shape[-2]:  # the config's feat_sizes is for another image size
        angles = attention.compute_cis(end_x=side, end_y=side).to(query.device)
    rotated = key.shape[-2] - unrotated
    query, key[:, :, :rotated] = apply_rotary_enc(
        query, key[:, :, :rotated], freqs_cis=angles, repeat_freqs_k=attention.rope_k_repeat
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(attention._recombine_heads(out))
