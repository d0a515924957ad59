"""A published architecture with the same weights in our engine and in transformers' Sam2VideoModel, an independent one.

Two things differ by configuration and are made equal here: transformers always turns the prompted mask into zeros and
ones before it is remembered and falls back to another mask when the best one is unstable; both are options of sam2
(`apply_postprocessing`), off in the sidecar because they lower the embedded tracker's J.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import sam2
import torch
from omegaconf import OmegaConf
from tracker_setup import HEIGHT, WIDTH, moving_shapes, some_prompts, stored

from revseg_jax.tracker.engine import Engine, _normalise
from revseg_jax.tracker.model import build_tracker
from revseg_jax.tracker.propagation import plan, propagate

SIZE, FRAMES = 256, 8
TOLERANCE = 1e-5  # of logits

# From sam2's names of tensors to those of transformers, applied in this order.
RENAMED = [
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_", ""),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    *((rf"mask_downscaling\.{n}\.", f"mask_embed.{to}.") for n, to in ((0, "conv1"), (3, "conv2"), (6, "conv3"))),
    *((rf"mask_downscaling\.{n}\.", f"mask_embed.{to}.") for n, to in ((1, "layer_norm1"), (4, "layer_norm2"))),
    *((rf"output_upscaling\.{n}\.", f"upscale_{to}.") for n, to in ((0, "conv1"), (1, "layer_norm"), (3, "conv2"))),
    (r"mask_downsampler\.encoder\.12\.", "mask_downsampler.final_conv."),
    *((rf"mask_downsampler\.encoder\.{3 * n}\.", f"mask_downsampler.layers.{n}.conv.") for n in range(4)),
    *((rf"mask_downsampler\.encoder\.{3 * n + 1}\.", f"mask_downsampler.layers.{n}.layer_norm.") for n in range(4)),
    (r"memory_encoder\.pix_feat_proj", "memory_encoder.feature_projection"),
    (r"memory_encoder\.fuser", "memory_encoder.memory_fuser"),
    (r"memory_encoder\.out_proj", "memory_encoder.projection"),
    *((rf"\.{short}", f".{long}") for short, long in (("dwconv", "depthwise_conv"), ("pwconv", "pointwise_conv"))),
    (r"\.gamma$", ".scale"),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm(?=[\d._])", ".layer_norm"),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"obj_ptr", "object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
]


def transformers_model(model, newer: bool):
    """transformers' model with the weights of `model`. newer: SAM2.1, else SAM2."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    sides = [SIZE // 4, SIZE // 8, SIZE // 16]
    config = Sam2VideoConfig(
        image_size=SIZE,
        vision_config={"model_type": "sam2_vision_model", "backbone_feature_sizes": [[side, side] for side in sides]},
        prompt_encoder_config={"image_size": SIZE},
        mask_decoder_config={"dynamic_multimask_via_stability": False},
        memory_attention_rope_feat_sizes=[SIZE // 16] * 2,
        enable_temporal_pos_encoding_for_object_pointers=newer,
        enable_occlusion_spatial_embedding=newer,
    )
    weights = {}
    for name, value in model.state_dict().items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        weights[name] = value
    points = [weights.pop(f"prompt_encoder.point_embeddings.{n}.weight") for n in range(4)]
    weights["prompt_encoder.point_embed.weight"] = torch.cat(points)
    weights["shared_image_embedding.positional_embedding"] = weights[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    other = Sam2VideoModel(config).eval()
    other.load_state_dict(weights)
    return other


@torch.inference_mode()
def transformers_logits(other, images: torch.Tensor, prompts) -> np.ndarray:
    """float32 [P, T, S/4, S/4], each prompt in a session of its own: forward from its keyframe, then backward.

    prompts: (keyframe, float32 [4] box in pixels of the images).
    """
    from transformers import Sam2VideoInferenceSession

    results = []
    for keyframe, box in prompts:
        session = Sam2VideoInferenceSession(images, video_height=SIZE, video_width=SIZE, dtype=torch.float32)
        inputs = {"point_coords": box.view(1, 1, 2, 2), "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32)}
        session.add_point_inputs(session.obj_id_to_idx(1), keyframe, inputs)
        session.obj_with_new_inputs = [1]
        found = {keyframe: other(session, frame_idx=keyframe).pred_masks}
        for reverse in (False, True):
            for output in other.propagate_in_video_iterator(session, keyframe, reverse=reverse):
                found[output.frame_idx] = output.pred_masks
        results.append(torch.cat([found[frame] for frame in range(len(images))])[:, 0].float().numpy())
    return np.array(results)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sam2", "sam2.1"])  # they differ in what is remembered, and how
def test_a_published_architecture_equals_transformers(family, tmp_path):
    tree = OmegaConf.load(Path(sam2.__file__).parent / f"configs/{family}/{family}_hiera_t.yaml")
    tree.model.image_size = SIZE
    OmegaConf.save(tree, tmp_path / "config.yaml")
    torch.manual_seed(0)
    model = build_tracker(tmp_path / "config.yaml", None)
    model.binarize_mask_from_pts_for_mem_enc = True  # as transformers does
    with torch.no_grad():
        for name, value in model.named_parameters():  # memories that matter, which those of fresh weights do not
            value *= 30 if "maskmem_tpos" in name else 1e5 if name.endswith("gamma") else 1
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 1  # present, or there is nothing to compare
    clip, prompts = stored(moving_shapes(FRAMES)), some_prompts(3, FRAMES)
    boxes = torch.tensor([box for _, box in prompts]) * SIZE / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    engine, chains = Engine(model), [plan(model, FRAMES, keyframe) for keyframe, _ in prompts]
    found = np.zeros((3, FRAMES, SIZE // 4, SIZE // 4), np.float32)
    for rows, at, logits in propagate(model, FRAMES, lambda frames: engine._look_up(clip, frames), chains, boxes):
        found[rows, at] = logits[:, 0]

    images = _normalise(torch.from_numpy(np.stack([clip.frame(t, SIZE) for t in range(FRAMES)])))
    other, keyframes = transformers_model(model, family == "sam2.1"), [keyframe for keyframe, _ in prompts]
    expected = transformers_logits(other, images, list(zip(keyframes, boxes, strict=True)))
    masks, true_masks = found > 0, expected > 0
    iou = (masks & true_masks).sum((2, 3)) / (masks | true_masks).sum((2, 3))
    assert 0.01 < masks.mean() < 0.99 and iou.min() > 0.99, iou
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    # The comparison sees the memories: without their place in time the masks are others.
    with torch.no_grad():
        other.memory_temporal_positional_encoding.zero_()
    forgetful = transformers_logits(other, images, [(keyframes[0], boxes[0])])[0]
    assert np.abs(forgetful - expected[0]).max() > 20 * TOLERANCE
