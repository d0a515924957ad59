"""How well a tracker does on held-out synthetic clips, through the video predictor's public calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from sam2.sam2_video_predictor import SAM2VideoPredictor
from tqdm import tqdm

from revseg_jax.data.frames import decode_frame, encode_frame, resize_square
from revseg_jax.data.synthetic import render
from revseg_jax.evaluation.metrics import region_similarity
from revseg_jax.tracker.training_data import MIN_PIXELS, box_of, jittered_box
from revseg_jax.tracker.training_step import normalise


@dataclass(frozen=True)
class Prompt:
    keyframe: int
    box: np.ndarray  # float64 [4] xyxy in pixels of the clip
    truth: np.ndarray  # bool [T, H, W]


def prompts_of(masks: np.ndarray, rng: np.random.Generator, enlarge: float | None = None) -> list[Prompt]:
    """One prompt for each object of bool [T, K, H, W]: its box on a random frame, jittered by 6 % of its sides.

    enlarge: instead of the jitter, every edge is moved outwards by this fraction of the side.
    """
    prompts = []
    for k in range(masks.shape[1]):
        visible = np.flatnonzero(masks[:, k].sum((1, 2)) >= MIN_PIXELS)
        if not len(visible):
            continue
        keyframe = int(rng.choice(visible))
        box = box_of(masks[keyframe, k])
        if enlarge is None:
            box = jittered_box(box, 0.06, masks.shape[2:], rng)
        else:
            sides = np.tile(box[2:] - box[:2], 2)
            box = box + np.array([-1, -1, 1, 1]) * enlarge * sides
            box = np.clip(box, 0, np.array(masks.shape[2:])[[1, 0, 1, 0]])
        prompts.append(Prompt(keyframe, box, masks[:, k]))
    return prompts


def predict(predictor: SAM2VideoPredictor, frames: np.ndarray, prompts: list[Prompt]) -> Iterator[np.ndarray]:
    """Yields bool [T, H, W] for each prompt on uint8 [T, H, W, 3]: forward, then backward from its keyframe."""
    images = normalise(torch.from_numpy(np.stack([resize_square(frame, predictor.image_size) for frame in frames])))
    loaded = (images, *frames.shape[1:3])
    # The package can only read files; this is the one place through which frames in memory get in.
    with mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=loaded):
        state = predictor.init_state("")
    with torch.inference_mode():
        # Filled once for all frames, the cache survives reset_state: the image encoder runs once a clip.
        for t in range(len(frames)):
            state["cached_features"][t] = (images[t : t + 1], predictor.forward_image(images[t : t + 1]))
    for prompt in prompts:
        predictor.reset_state(state)
        predictor.add_new_points_or_box(state, prompt.keyframe, obj_id=1, box=prompt.box)
        masks = np.zeros(frames.shape[:3], bool)
        for reverse in (False, True):
            for t, _, logits in predictor.propagate_in_video(state, prompt.keyframe, reverse=reverse):
                masks[t] = logits[0, 0].numpy() > 0
        yield masks


def score(
    predictor: SAM2VideoPredictor,
    difficulty: str,
    clips: int,
    seed: int = 0,
    enlarge: float | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Scores on the first `clips` held-out clips of a difficulty, every object prompted once, frames stored as JPEG.

    j: mean over objects of the mean J over all frames. copy: the same for the keyframe's true mask on all frames.
    under_half: the fraction of objects with a mean J under 0.5. absent: J over the frames without the object.
    """
    j, copied, absent = [], [], []
    with mock.patch("sam2.sam2_video_predictor.tqdm", lambda frames, **_: frames):  # a bar of its own for every pass
        for clip in tqdm(range(clips), f"scoring, {difficulty}", disable=not progress or None):
            scene = render(clip, difficulty, "test")
            prompts = prompts_of(scene.masks, np.random.default_rng([seed, clip]), enlarge)
            frames = np.stack([decode_frame(encode_frame(frame)) for frame in scene.frames])
            for prompt, masks in zip(prompts, predict(predictor, frames, prompts), strict=True):
                frame_j = region_similarity(masks, prompt.truth)
                j.append(frame_j.mean())
                absent.extend(frame_j[~prompt.truth.any((1, 2))])
                still = np.broadcast_to(prompt.truth[prompt.keyframe], prompt.truth.shape)
                copied.append(region_similarity(still, prompt.truth).mean())
    return {
        "j": float(np.mean(j)),
        "copy": float(np.mean(copied)),
        "under_half": float(np.mean(np.array(j) < 0.5)),
        "absent": float(np.mean(absent)) if absent else 1.0,
        "objects": len(j),
        "clips": clips,
    }
