"""Masks from features and boxes: SAM's prompt encoder and mask decoder, for frames of a video.

In shapes: b prompts, C = hidden_dim, h x w the coarsest feature map, S = image_size.
"""

from __future__ import annotations

import torch
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from torch import Tensor


def decode_video(
    model: SAM2Base, image: Tensor, fine: list[Tensor], boxes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditioned features [b, C, h, w] -> mask logits float32 [b, 1, S/4, S/4], pointers [b, C], object scores [b, 1].

    boxes: [b, 4] xyxy in pixels of the S x S frames, or None for a frame without a prompt. Differs from
    SAM2Base._forward_sam_heads in that only the best of several masks goes any further.
    """
    several = model._use_multimask(boxes is not None, None if boxes is None else {"point_labels": torch.empty(1, 2)})
    masks, ious, tokens, scores = _decode(model, image, fine, boxes, several)
    every, best = torch.arange(len(image), device=image.device), ious.argmax(dim=-1)
    masks = masks[every, best][:, None].float()
    pointers = model.obj_ptr_proj(tokens[every, best] if tokens.shape[1] > 1 else tokens[:, 0])
    if model.pred_obj_scores:
        masks = torch.where(scores[..., None, None] > 0, masks, NO_OBJ_SCORE)
        present = scores.sigmoid() if model.soft_no_obj_ptr else (scores > 0).float()
        pointers = (present * pointers if model.fixed_no_obj_ptr else pointers) + (1 - present) * model.no_obj_ptr
    return masks, pointers, scores


def _decode(
    model: SAM2Base, image: Tensor, fine: list[Tensor], boxes: Tensor | None, several: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SAM's heads: masks [b, m, S/4, S/4], their predicted IoUs [b, m], tokens [b, m or 1, C], object scores [b, 1]."""
    count, device = len(image), image.device
    if boxes is None:
        points, labels = torch.zeros(count, 1, 2, device=device), torch.full((count, 1), -1, device=device)
    else:  # SAM takes a box as two points with labels 2 and 3
        points, labels = boxes.view(count, 2, 2), torch.tensor([[2, 3]], device=device).expand(count, 2)
    sparse, dense = model.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)
    return model.sam_mask_decoder(
        image_embeddings=image,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=several,
        repeat_image=False,
        high_res_features=fine or None,
    )
