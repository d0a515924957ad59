"""One differentiable pass of SAM2 over a batch of clips, and its loss.

`track_step` of the sam2 package is called in the order in which the video predictor calls it (keyframe, forward, then
backward with the forward memories still there), so that what is trained is what runs later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

# Normalisation of sam2.utils.misc.load_video_frames
_MEAN = torch.tensor((0.485, 0.456, 0.406))
_STD = torch.tensor((0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Batch:
    """C windows of T frames, S = image_size; B objects spread over them, all prompted on the same frame."""

    frames: Tensor  # uint8 [C, T, S, S, 3]
    foreground: Tensor  # bool [C, T, S, S], pixels of any object, prompted or not
    masks: Tensor  # bool [B, T, S, S], visible pixels
    clip_of: Tensor  # int64 [B], which window an object belongs to
    boxes: Tensor  # float32 [B, T, 4] jittered xyxy box in pixels of the S x S frames; zeros where the object is absent
    keyframe: int  # every object is visible there


@dataclass(frozen=True)
class Decoded:
    """What the mask decoder said about N object-frames, before absent ones are overwritten by a constant."""

    masks: Tensor  # float32 [N, 1, S/4, S/4] logits
    iou: Tensor  # float32 [N, 1] predicted IoU
    score: Tensor  # float32 [N, 1] logit of the object being in the frame


@dataclass(frozen=True)
class Features:
    """Backbone outputs at each level, [C, T, channels, h, w], and their position encodings [1, channels, h, w]."""

    maps: list[Tensor]
    positions: list[Tensor]


def normalise(frames: Tensor) -> Tensor:
    """uint8 [..., S, S, 3] -> float32 [..., 3, S, S] as SAM2's image encoder expects."""
    return ((frames.float() / 255 - _MEAN.to(frames.device)) / _STD.to(frames.device)).movedim(-1, -3)


def encode(model: SAM2Base, frames: Tensor) -> Features:
    """Runs the image encoder once on every frame of uint8 [C, T, S, S, 3]."""
    clips, length = frames.shape[:2]
    out = model.forward_image(normalise(frames).flatten(0, 1))
    return Features(
        maps=[level.unflatten(0, (clips, length)) for level in out["backbone_fpn"]],
        positions=[level[:1] for level in out["vision_pos_enc"]],
    )


def segment_frames(model: SAM2Base, features: Features, batch: Batch, objects: Tensor, times: Tensor) -> Decoded:
    """Box to mask on single frames, without memory: object objects[n] on frame times[n], n < N."""
    index = batch.clip_of[objects] * batch.frames.shape[1] + times
    maps = [level.flatten(0, 1).index_select(0, index) for level in features.maps]
    image = maps[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    with tap_decoder(model) as calls:
        model._forward_sam_heads(
            image, box_prompt(batch.boxes[objects, times]), None, maps[:-1], multimask_output=False
        )
    return calls[0]


def track(model: SAM2Base, features: Features, batch: Batch, forced: Tensor | None = None) -> Decoded:
    """Prompts every object on the keyframe and follows it over the window; N = T * B, time-major.

    forced: bool [B, T], replaces the model's own (hard, gradient-free) verdict on whether the object is in the frame,
    so that memories make sense before the score head has learnt anything. The returned score is always the model's.
    """
    length, key = batch.frames.shape[1], batch.keyframe
    order = [(key, False)] + [(t, False) for t in range(key + 1, length)] + [(t, True) for t in range(key - 1, -1, -1)]
    outputs = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    sizes = [tuple(level.shape[-2:]) for level in features.maps]
    objects = len(batch.clip_of)
    positions = [p.expand(objects, -1, -1, -1).flatten(2).permute(2, 0, 1) for p in features.positions]
    decoded: dict[int, Decoded] = {}
    for t, reverse in order:
        maps = [level[:, t].index_select(0, batch.clip_of) for level in features.maps]
        with tap_decoder(model, None if forced is None else forced[:, t]) as calls:
            out = model.track_step(
                frame_idx=t,
                is_init_cond_frame=t == key,
                current_vision_feats=[level.flatten(2).permute(2, 0, 1) for level in maps],
                current_vision_pos_embeds=positions,
                feat_sizes=sizes,
                point_inputs=box_prompt(batch.boxes[:, t]) if t == key else None,
                mask_inputs=None,
                output_dict=outputs,
                num_frames=max(length, model.max_obj_ptrs_in_encoder),  # windows are cut out of longer clips
                track_in_reverse=reverse,
            )
        outputs["cond_frame_outputs" if t == key else "non_cond_frame_outputs"][t] = out
        decoded[t] = calls[0]
    parts = [decoded[t] for t in range(length)]
    return Decoded(*(torch.cat([getattr(part, name) for part in parts]) for name in ("masks", "iou", "score")))


def mask_loss(decoded: Decoded, truth: Tensor) -> Tensor:
    """Mean over N object-frames of 5 BCE + dice + L1 of the predicted IoU (where visible) + BCE of the object score.

    truth: bool [N, S, S]. The loss is taken at the full resolution, where J is measured: the logits at a quarter of it
    are enlarged as the predictor enlarges them, and learn to place the boundary between their own pixels.
    """
    logits = F.interpolate(decoded.masks, size=truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0].flatten(1)
    target = truth.flatten(1).float()
    visible = truth.flatten(1).any(1).float()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    with torch.no_grad():
        on = logits > 0
        iou = (on & truth.flatten(1)).sum(1) / (on | truth.flatten(1)).sum(1).clamp(min=1)
    score = F.binary_cross_entropy_with_logits(decoded.score[:, 0], visible)
    return (5 * bce + visible * (dice + (decoded.iou[:, 0] - iou).abs())).mean() + score


def box_prompt(boxes: Tensor) -> dict[str, Tensor]:
    """float32 [B, 4] xyxy -> a box as two labelled corner points, as SAM2VideoPredictor.add_new_points_or_box does."""
    labels = torch.tensor([2, 3], dtype=torch.int32, device=boxes.device)
    return {"point_coords": boxes.view(-1, 2, 2), "point_labels": labels.expand(len(boxes), 2)}


@contextmanager
def tap_decoder(model: SAM2Base, present: Tensor | None = None) -> Iterator[list[Decoded]]:
    """Collects the decoder's raw output; with `present` (bool [B]) hands that on in place of the object score."""
    decoder, calls = model.sam_mask_decoder, []

    def predict_masks(**inputs):
        masks, iou, tokens, score = type(decoder).predict_masks(decoder, **inputs)
        calls.append(Decoded(masks[:, :1], iou[:, :1], score))
        return masks, iou, tokens, score if present is None else present[:, None].float() * 20 - 10

    decoder.predict_masks = predict_masks
    try:
        yield calls
    finally:
        del decoder.predict_masks
