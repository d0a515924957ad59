"""One clip and its conversations as arrays of fixed shapes: the video is the prefix, the conversations are suffixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import grain
import numpy as np

from revseg_jax.chain.prompts import IM_END, VIDEO, prefix_text
from revseg_jax.config import ChainConfig
from revseg_jax.data.frames import resize_square
from revseg_jax.data.sampling import sample_frames
from revseg_jax.data.synthetic import COLOURS, DIFFICULTIES, SHAPES, render
from revseg_jax.errors import InputError
from revseg_jax.policy.config import ModelConfig
from revseg_jax.policy.rope import merge_order, sequence_positions
from revseg_jax.pretraining.history import template_answers, track_facts
from revseg_jax.pretraining.primitives import Conversation, View, conversations, view

NEXT = "\n<|im_start|>user\n"
ASSISTANT = f"{IM_END}\n<|im_start|>assistant\n"
POINTERS = 10  # names that a suffix decides on, at most
PATCH_CLASSES = len(COLOURS) + 1 + len(SHAPES) + 1  # each with a class "background" in the last place


@dataclass(frozen=True)
class ExampleMaker:
    """Turns a clip number into arrays. Picklable, so that Grain's workers can hold it.

    Attributes:
      suffixes: how many (chain, box, video, meaning) conversations a clip gets; the first two kinds show an image. When
        there are boxes alone the clip's video is not shown at all.
      slots: tokens a suffix has room for; turns that do not fit are left out
    """

    tokenizer: Any
    model: ModelConfig
    chain: ChainConfig
    difficulty: str
    suffixes: tuple[int, int, int, int]
    slots: int
    seed: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Keys: images uint8 [I, 1, K, K, 3]; of the G suffixes tokens int32 [G, slots], positions int32 [3, G, slots],
        mask bool and trained float32 (how much the token counts, 0 outside answers), pointers int32 [G, POINTERS, 2]
        (the slot from which an object's name is predicted, and the object; -1 where there are fewer); and `image_*`
        labels for the auxiliary losses (see `patch_labels`). Where the video is shown also frames uint8 [N, S, S, 3]
        and their `video_*` labels."""
        rng = np.random.default_rng([self.seed, index])
        seen = self.draw_view(rng)
        scene, sampled = seen.scene, seen.sampled
        talks = conversations(rng, seen, self.chain, *self.suffixes)
        images = [talk.image_frame or 0 for talk in talks[: self.suffixes[0] + self.suffixes[1]]]
        packed = [self.pack(talk) for talk in talks]
        keyframes = np.stack([resize_square(scene.frames[sampled[i]], self.chain.keyframe_size) for i in images])
        patch, merge = self.model.vision.patch_size, self.model.vision.spatial_merge_size
        labels = patch_labels(seen, np.array(images), self.chain.keyframe_size // patch, merge, "image")
        example = {
            "images": keyframes[:, None],
            **{name: np.stack([part[name] for part in packed]) for name in ("tokens", "mask", "trained", "pointers")},
            "positions": np.stack([part["positions"] for part in packed], axis=1),
            **labels,
        }
        if self.shows_video:
            example["frames"] = np.stack([resize_square(scene.frames[t], self.chain.frame_size) for t in sampled])
            example |= patch_labels(seen, np.arange(len(sampled)), self.chain.frame_size // patch, merge, "video")
        return example

    def draw_view(self, rng: np.random.Generator) -> View:
        """A scene with as many frames as are shown, of which something can be seen: now and then the wall hides
        everything in all sampled frames. Raises InputError where no clip is so long."""
        longest = DIFFICULTIES[self.difficulty].frames[1]
        if self.chain.frames > longest:
            raise InputError(f"chain.frames={self.chain.frames}: {self.difficulty} clips have {longest} at most")
        while True:
            scene = render(int(rng.integers(1 << 40)), self.difficulty, "train")
            seen = view(scene, sample_frames(len(scene.frames), self.chain.frames))
            if len(seen.sampled) == self.chain.frames and seen.visible.any():
                return seen

    @property
    def shows_video(self) -> bool:
        chains, _, videos, meanings = self.suffixes
        return chains + videos + meanings > 0

    @cached_property
    def prefix_tokens(self) -> np.ndarray:
        """int32 [P]: the system prompt and the opened user turn with the video, the same for every clip."""
        before, _ = prefix_text(self.chain, "", self.chain.frames, 0.0).split(VIDEO)
        tokens = self.tokenizer(before + VIDEO * self.shows_video)["input_ids"]
        return self._expand(tokens, self.model.video_token_id, self.video_grid())

    @cached_property
    def prefix_positions(self) -> np.ndarray:
        """int32 [3, P]"""
        grids, seconds = [self.video_grid()] * self.shows_video, [self.seconds_per_grid()] * self.shows_video
        return sequence_positions(self.prefix_tokens, self.model, grids, seconds)

    def video_grid(self) -> tuple[int, int, int]:
        side = self.chain.frame_size // self.model.vision.patch_size
        return self.chain.frames // self.model.vision.temporal_patch_size, side, side

    def image_grid(self) -> tuple[int, int, int]:
        side = self.chain.keyframe_size // self.model.vision.patch_size
        return 1, side, side

    def seconds_per_grid(self) -> float:
        return self.model.vision.temporal_patch_size / self.chain.fps

    def _expand(self, tokens: list[int], token: int, grid: tuple[int, int, int]) -> np.ndarray:
        count = int(np.prod(grid)) // self.model.vision.spatial_merge_size**2
        ids = np.asarray(tokens, np.int32)
        return np.repeat(ids, np.where(ids == token, count, 1))

    def pack(self, talk: Conversation) -> dict[str, np.ndarray]:
        """tokens int32 [slots], positions int32 [3, slots], mask bool [slots], trained float32 [slots], pointers int32
        [POINTERS, 2], as in an example."""
        tokens, trained, pointers = [], [], []
        for number, turn in enumerate(talk.turns):
            asked = self._encode((NEXT if number else "") + turn.user + ASSISTANT)
            answered = self._encode(turn.answer + IM_END)
            if len(tokens) + len(asked) + len(answered) > self.slots:
                if number == 0 or talk.image_frame is not None and "<|image_pad|>" in turn.user:
                    raise ValueError(f"a turn of {len(asked) + len(answered)} tokens does not fit: {turn.user!r}")
                continue
            tokens += asked
            if turn.target is not None:
                pointers.append((len(tokens) + len(self._encode(turn.before_name)) - 1, turn.target))
            tokens += answered
            trained += [0.0] * len(asked) + [talk.weight] * len(answered)
        prefix = self.prefix_tokens
        grids = [self.video_grid()] * self.shows_video + [self.image_grid()] * (talk.image_frame is not None)
        seconds = [self.seconds_per_grid()] * self.shows_video
        whole = np.concatenate([prefix, np.array(tokens, np.int32)])
        positions = sequence_positions(whole, self.model, grids, seconds)[:, len(prefix) :]
        padding = self.slots - len(tokens)
        pointers = pointers[:POINTERS] + [(-1, -1)] * (POINTERS - len(pointers))
        return {
            "tokens": np.pad(np.array(tokens, np.int32), (0, padding)),
            "positions": np.pad(positions, ((0, 0), (0, padding))),
            "mask": np.arange(self.slots) < len(tokens),
            "trained": np.pad(np.array(trained, np.float32), (0, padding)),
            "pointers": np.array(pointers, np.int32),
        }

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        """Remembers texts: the same few thousand questions and answers come again and again."""

        @lru_cache(maxsize=100_000)
        def encode(text: str) -> list[int]:
            tokens = self.tokenizer(text)["input_ids"]
            return self._expand(tokens, self.model.image_token_id, self.image_grid()).tolist()

        return encode


def patch_labels(seen: View, frames: np.ndarray, side: int, merge: int, kind: str) -> dict[str, np.ndarray]:
    """What stands at the centre of each patch, for the auxiliary losses that teach to see, to locate and to follow.

    frames: int [F] among the sampled ones; side: patches a row. Results in merge order: `{kind}_colour` and
    `{kind}_shape` int32 [F, side * side] (the number of classes means background); the object's box float32
    [F, side * side, 4] as shares of the image, `{kind}_place` measured from the image's corner and `{kind}_edges` from
    the patch's centre. For the kind "video" also which object it is (-1: none), what it has done so far and which
    questions it answers: `video_object` int32 [F, side * side], `video_facts` float32 [F, side * side, FACTS] and
    `video_answers` int32 [F, side * side, templates] (see history.py).
    """
    size = seen.size
    rows, columns = merge_order(side, side, merge)
    y, x = ((rows + 0.5) * size / side).astype(int), ((columns + 0.5) * size / side).astype(int)
    inside = seen.scene.masks[seen.sampled[frames]][:, :, y, x]  # [F, K, patches]
    which, found = inside.argmax(1), inside.any(1)
    colours = np.array([list(COLOURS).index(item.colour) for item in seen.scene.objects])
    shapes = np.array([SHAPES.index(item.shape) for item in seen.scene.objects])
    boxes = np.take_along_axis(seen.boxes[frames], which[..., None], axis=1) / size
    centre = np.stack([(columns + 0.5) / side, (rows + 0.5) / side] * 2, -1)
    labels = {
        "colour": np.where(found, colours[which], len(COLOURS)).astype(np.int32),
        "shape": np.where(found, shapes[which], len(SHAPES)).astype(np.int32),
        "place": np.where(found[..., None], boxes, 0).astype(np.float32),
        "edges": np.where(found[..., None], boxes - centre, 0).astype(np.float32),
    }
    if kind == "video":
        facts = np.take_along_axis(track_facts(seen)[frames], which[..., None], axis=1)
        labels["object"] = np.where(found, which, -1).astype(np.int32)
        labels["facts"] = np.where(found[..., None], facts, 0).astype(np.float32)
        labels["answers"] = np.where(found[..., None], template_answers(seen)[which], -1).astype(np.int32)
    return {f"{kind}_{name}": label for name, label in labels.items()}


def batches(maker: ExampleMaker, clips: int, batch: int, first_clip: int = 0):
    """Batches of `batch` clips each; a thread renders ahead of the training step, which leaves the interpreter free."""
    dataset = grain.MapDataset.range(first_clip, first_clip + clips).map(maker).batch(batch, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
