"""How the embedded tracker's training gets off the ground: initialisation, and what is learnt before the first mask.

From default initialisation and single frames alone a network of this size stays for a thousand steps at a blob near
the box (J 0.27). Three things have to come together, and each is given a start of its own: the decoder must know where
a box lies, the image must be loud enough to be heard beside the position encodings, and its features must tell objects
from background. With all three, J passes 0.6 after 200 steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sam2.modeling.sam.transformer import Attention
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor
from tqdm import tqdm

from revseg_jax.tracker.training_step import Features, box_prompt, mask_loss, normalise, tap_decoder

# The prompt encoder's random Fourier features are made for 64 x 64 feature maps and too fine for one of 8 x 8.
POINT_FREQUENCY_SCALE = 0.3


@torch.no_grad()
def initialise(model: SAM2Base, frames: Tensor) -> None:
    """Changes a freshly built model in place. frames: uint8 [N, S, S, 3], typical images."""
    model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(POINT_FREQUENCY_SCALE)
    # Queries and keys that start out equal (and larger) attend to equal positions.
    for layer in model.sam_mask_decoder.transformer.modules():
        if isinstance(layer, Attention):
            layer.q_proj.weight.mul_(2)
            layer.k_proj.weight.copy_(layer.q_proj.weight)
    # The convolutions behind the backbone: unit variance on images (LSUV, Mishkin & Matas 2016).
    levels = model.image_encoder.trunk(normalise(frames))
    laterals = [layer.conv for layer in model.image_encoder.neck.convs]  # coarsest first
    for conv, level in zip(laterals, levels[::-1], strict=True):
        _to_unit_variance(conv, level)
    _to_unit_variance(model.sam_mask_decoder.conv_s0, laterals[-1](levels[0]))
    _to_unit_variance(model.sam_mask_decoder.conv_s1, laterals[-2](levels[1]))


def learn_boxes(model: SAM2Base, steps: int, seed: int, count: int = 24) -> float:
    """Teaches the prompt encoder and the mask decoder to fill a box, without any image; returns the last loss."""
    modules = (model.sam_prompt_encoder, model.sam_mask_decoder)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    size, channels, loss = model.image_size, model.hidden_dim, torch.zeros(())
    image = torch.zeros(count, channels, size // 16, size // 16)
    fine = [
        torch.zeros(count, channels // 8, size // 4, size // 4),
        torch.zeros(count, channels // 4, size // 8, size // 8),
    ]
    middles = torch.arange(size) + 0.5
    for step in tqdm(range(steps), "boxes"):
        centre = torch.rand(count, 2, generator=generator) * size
        half = (0.03 + 0.2 * torch.rand(count, 2, generator=generator)) * size
        boxes = torch.cat([centre - half, centre + half], 1).clamp(0, size)
        columns = (middles > boxes[:, :1]) & (middles < boxes[:, 2:3])
        rows = (middles > boxes[:, 1:2]) & (middles < boxes[:, 3:])
        with tap_decoder(model) as calls:
            model._forward_sam_heads(image, box_prompt(boxes), None, fine, multimask_output=False)
        loss = mask_loss(calls[0], rows[:, :, None] & columns[:, None])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return loss.item()


def foreground_heads(model: SAM2Base) -> torch.nn.ModuleList:
    """Throw-away linear readings of the feature maps at strides 4, 8 and 16, for `foreground_loss`."""
    d_model = model.hidden_dim
    return torch.nn.ModuleList(
        [torch.nn.Conv2d(d_model // 8, 1, 1), torch.nn.Conv2d(d_model // 4, 4, 1), torch.nn.Conv2d(d_model, 16, 1)]
    )


def foreground_loss(heads: torch.nn.ModuleList, features: Features, foreground: Tensor) -> Tensor:
    """Sum over levels of the BCE of object against background at stride 4, foreground: bool [C, T, S, S].

    The mask decoder only begins to look at the image once the image features tell objects from background. Left to
    itself that takes hundreds of steps; asked for directly, about a hundred.
    """
    target = F.avg_pool2d(foreground.flatten(0, 1)[:, None].float(), 4)
    loss = target.new_zeros(())
    for level, (head, maps) in enumerate(zip(heads, features.maps, strict=True)):
        logits = F.pixel_shuffle(head(maps.flatten(0, 1)), 2**level)
        loss = loss + F.binary_cross_entropy_with_logits(logits, target)
    return loss


def _to_unit_variance(conv: torch.nn.Conv2d, inputs: Tensor) -> None:
    out = conv(inputs)
    mean, deviation = out.mean((0, 2, 3)), out.std((0, 2, 3))
    conv.weight.div_(deviation[:, None, None, None])
    conv.bias.sub_(mean).div_(deviation)
