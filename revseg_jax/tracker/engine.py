"""Tracks prompts on the clips of a ClipStore: features computed once a frame, prompts batched, masks at clip size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor

from revseg_jax.errors import InputError
from revseg_jax.tracker.clips import Clip
from revseg_jax.tracker.features import FeatureCache
from revseg_jax.tracker.propagation import plan, propagate, unsupported
from revseg_jax.tracker.turns import Call, Turns

Prompt = tuple[int, tuple[float, float, float, float]]  # keyframe and box x1, y1, x2, y2 in pixels of the clip

FEATURE_BYTES = 2 << 30  # on the model's device
HOST_FEATURE_BYTES = 8 << 30  # beside a GPU
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of sam2.utils.misc.load_video_frames


class CallerGone(Exception):
    """Nobody waits for this answer any more."""


class Engine:
    """One SAM2 model and the features of the frames it saw last. Safe to call from several threads."""

    def __init__(
        self,
        model: SAM2VideoPredictor,
        feature_bytes: int = FEATURE_BYTES,
        host_feature_bytes: int | None = None,
        compiled: bool = False,
    ):
        """feature_bytes: of image features on the model's device; host_feature_bytes: of those that had to leave it
        (None: HOST_FEATURE_BYTES beside a GPU, 0 on the CPU). compiled: the image encoder goes through torch.compile.
        """
        option = unsupported(model)
        if option:
            raise InputError(f"the tracker's config asks for {option}, which the sidecar does not support")
        self.model = model
        self.image_size = model.image_size
        self.on_gpu = model.device.type == "cuda"
        # As many prompts (frames) go through the model together as keep its activations at a few hundred megabytes.
        self.prompts_together = max(4, min(64, (1 << 22) // model.image_size**2))
        self.frames_together = max(1, min(16, (1 << 21) // model.image_size**2))
        if host_feature_bytes is None:
            host_feature_bytes = HOST_FEATURE_BYTES if self.on_gpu else 0
        self.features = FeatureCache(model.device, feature_bytes, host_feature_bytes)
        self.hits = self.misses = 0  # frames whose features were asked for: held, or computed
        self.half = self.on_gpu  # bfloat16 where it is fast; on the CPU the result is exactly the stock predictor's
        self.compiled, self._plain = compiled, model.image_encoder.forward
        if compiled:
            model.image_encoder.forward = torch.compile(self._plain, dynamic=False)
        self.turns = Turns()

    def warm_up(self) -> str | None:
        """Compiles the image encoder on blank frames, which takes minutes. Returns why it could not be, or None."""
        try:
            with torch.inference_mode(), self._autocast():
                # Twice: what SAM2 makes of an image size at its first image it then looks up, by another program.
                for _ in range(2):
                    self._encode(np.zeros((1, self.image_size, self.image_size, 3), np.uint8))
        except Exception as error:  # no C compiler here, a GPU it does not know: torch has no common class for these
            if not self.compiled:
                raise
            self.compiled, self.model.image_encoder.forward = False, self._plain
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def track(
        self,
        clip: Clip,
        prompts: Sequence[Prompt],
        frames: Sequence[int] | None = None,
        awaited: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
        """Yields (indices into prompts, the frame each is at, masks bool [n, clip.height, clip.width]) as it goes.

        Every prompt comes once with every frame (of `frames`, if given): its keyframe, those after it going forward,
        then those before it going backward. Equal prompts should be merged by the caller. The model is free for other
        calls between two steps, and before each it is asked whether the answer is still awaited; CallerGone if not.
        """
        wanted, call = None if frames is None else frozenset(frames), self.turns.arrive()
        for chosen in self._batches(clip, prompts):
            yield from self._track_together(call, clip, prompts, chosen, wanted, awaited)

    def _batches(self, clip: Clip, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Indices into prompts, by keyframe, as many at a time as go through the model together."""
        order = sorted(range(len(prompts)), key=lambda index: prompts[index][0])
        together = min(self.prompts_together, max(1, (1 << 26) // (clip.height * clip.width)))
        return (order[start : start + together] for start in range(0, len(order), together))

    def _boxes(self, clip: Clip, prompts: Sequence[Prompt], chosen: list[int]) -> Tensor:
        """float32 [n, 4] in pixels of the model's frames."""
        size = torch.tensor([clip.width, clip.height, clip.width, clip.height])
        boxes = torch.tensor([prompts[index][1] for index in chosen], dtype=torch.float32) / size * self.image_size
        return boxes.to(self.model.device)

    def _track_together(
        self,
        call: Call,
        clip: Clip,
        prompts: Sequence[Prompt],
        chosen: list[int],
        wanted: frozenset[int] | None,
        awaited: Callable[[], bool],
    ) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
        steps = propagate(
            self.model,
            clip.frames,
            lambda frames: self._look_up(clip, frames),
            [plan(self.model, clip.frames, prompts[index][0], wanted) for index in chosen],
            self._boxes(clip, prompts, chosen),
        )
        while True:
            with call.turn(), torch.inference_mode(), self._autocast():
                if not awaited():
                    raise CallerGone
                step = next(steps, None)
                if step is None:
                    return
                rows, at, logits = step
                keep = [n for n, frame in enumerate(at) if wanted is None or frame in wanted]
                masks = _masks(logits[keep], clip)
            if keep:
                yield [chosen[rows[n]] for n in keep], [at[n] for n in keep], masks

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.half)

    def _look_up(self, clip: Clip, frames: list[int]) -> list[Tensor]:
        """Feature maps [len(frames), channels, h, w] of each level, finest first."""
        found = {}
        for frame in sorted(set(frames)):
            if frame not in found:
                found.update(self._cached_or_computed(clip, frame))
        return [torch.cat(maps) for maps in zip(*(found[frame] for frame in frames), strict=True)]

    def _cached_or_computed(self, clip: Clip, frame: int) -> dict[int, list[Tensor]]:
        held = self.features.get((clip.clip_id, frame))
        if held is not None:
            self.hits += 1
            return {frame: held}
        # Neighbours will be asked for next, and together they cost less.
        first = frame - frame % self.frames_together
        block = range(first, min(first + self.frames_together, clip.frames))
        missing = [index for index in block if (clip.clip_id, index) not in self.features]
        self.misses += len(missing)
        levels = self._encode(np.stack([clip.frame(index, self.image_size) for index in missing]))
        computed = {index: [level[n : n + 1].clone() for level in levels] for n, index in enumerate(missing)}
        for index, maps in computed.items():
            self.features.put((clip.clip_id, index), maps)
        return computed

    def _encode(self, images: np.ndarray) -> list[Tensor]:
        """uint8 [n, S, S, 3] -> feature maps [n or more, channels, h, w] of each level, finest first."""
        if self.compiled and len(images) < self.frames_together:  # one shape, so that it is compiled once
            padding = ((0, self.frames_together - len(images)), (0, 0), (0, 0), (0, 0))
            images = np.pad(images, padding)
        levels = self.model.forward_image(_normalise(torch.from_numpy(images).to(self.model.device)))["backbone_fpn"]
        return levels[-self.model.num_feature_levels :]


def _masks(logits: Tensor, clip: Clip) -> np.ndarray:
    """Mask logits [n, 1, S/4, S/4] -> bool [n, clip.height, clip.width]."""
    if logits.shape[-2:] != (clip.height, clip.width):
        logits = F.interpolate(logits, size=(clip.height, clip.width), mode="bilinear", align_corners=False)
    return (logits[:, 0] > 0).cpu().numpy()


def _normalise(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] as sam2's loaders of video frames do."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (_MEAN, _STD))
    return (images.movedim(-1, 1).float() / 255 - mean) / std
