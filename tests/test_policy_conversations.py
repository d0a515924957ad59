"""`load_policy(...).logits(...)`: any conversation the processor can write, against transformers' torch model."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_policy import (
    TEXT_TOKENS,
    Conversation,
    conversation,
    processor_output,
    random_model,
    save_policy_folder,
    torch_batch,
)
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from revseg_jax.errors import InputError
from revseg_jax.policy import load_policy
from revseg_jax.policy.checkpoint import resolve_folder
from revseg_jax.policy.packing import bucket, pack, place_slices


def make_pair(seed: int, folder):
    """(torch model, our policy) of one random configuration."""
    model = random_model(seed)
    return model, load_policy(save_policy_folder(model, folder / "policy"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(36, tmp_path_factory.mktemp("model"))


KINDS = {
    # An int is that many text tokens, (0, height, width) an image, (time, height, width) a video, in patches. Grids are
    # odd on purpose: smaller than a window, one row, uneven borders.
    "text": (23,),
    "one image": (3, (0, 6, 10), 5),
    "images": (2, (0, 2, 2), 1, (0, 14, 4), (0, 4, 10), 7),
    "one video": (4, (3, 6, 8), 6),
    "videos": ((2, 4, 4), 3, (1, 10, 2), 2, (5, 2, 6), 3),
    "images and videos": (2, (2, 6, 6), 2, (0, 8, 4), 3, (1, 4, 12), (0, 6, 2), 4),
}


def talk_of(kind: str, policy) -> Conversation:
    return conversation(np.random.default_rng(0), policy.policy.config, *KINDS[kind])


def assert_same_logits(pair, inputs: dict) -> None:
    model, policy = pair
    with torch.no_grad():
        expected = model(**torch_batch(inputs)).logits.numpy()
    ours = policy.logits(**inputs)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    real = inputs["attention_mask"].astype(bool)
    assert 0.3 < expected[real].std() < 3
    np.testing.assert_allclose(ours[real], expected[real], atol=2e-4)


@pytest.mark.parametrize("seed", [31, 33, 37])
def test_padded_batches_of_all_kinds(seed, tmp_path):
    pair = make_pair(seed, tmp_path)
    talks = [talk_of(kind, pair[1]) for kind in KINDS]
    for side in ("left", "right"):
        assert_same_logits(pair, processor_output(talks, side))


@pytest.mark.parametrize("kind", ["text", "one image", "videos"])
def test_each_kind_alone(pair, kind):
    assert_same_logits(pair, processor_output([talk_of(kind, pair[1])]))


def test_the_processors_own_output():
    """The embedded policy's folder, read by transformers' processor and torch model."""
    folder = resolve_folder("embedded")
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((60, 100), (150, 70))]
    video = rng.integers(0, 256, (6, 90, 120, 3), np.uint8)
    show = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
    texts = [f"{show['image']}Which of {show['video']} is it?", "No picture.", f"{show['image']}A box?"]
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=texts, images=images, videos=[video], padding=True, return_tensors="np")
    ours = load_policy("embedded").logits(**inputs)
    with torch.no_grad():
        expected = model(**processor(text=texts, images=images, videos=[video], padding=True, return_tensors="pt"))
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(ours[real], expected.logits.numpy()[real], atol=2e-4)


def test_fifty_mixed_batches_compile_once_a_bucket(pair, caplog):
    """Counted in JAX's own log: not only our two functions, anything that would compile by the way counts."""
    policy = pair[1]
    config, rng = policy.policy.config, np.random.default_rng(2)
    batches, buckets = [], set()
    for _ in range(50):
        talks = []
        for _ in range(2):
            grids = [(rng.integers(0, 4), *(2 * rng.integers(1, 4, 2))) for _ in range(rng.integers(1, 3))]
            talks.append(conversation(rng, config, *grids, int(rng.integers(1, 9))))
        batches.append(processor_output(talks, rng.choice(["left", "right"])))
        packed = pack(config, **{k: v for k, v in batches[-1].items() if k != "mm_token_type_ids"})
        buckets.add(("encode", packed.vision.patches.shape))
        buckets.add(("read", packed.tokens.shape, np.prod(packed.vision.patches.shape)))
    assert len({batch["input_ids"].shape for batch in batches}) > 20 and len(buckets) < 15
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for batch in batches:
            policy.logits(**batch)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling ")]
    assert 1 < len(compiled) <= len(buckets)


def test_lengths_can_be_chosen(pair):
    policy = replace(pair[1], lengths=(200, 40, 90))
    rng, config = np.random.default_rng(4), policy.policy.config
    for count, slots in ((7, 40), (40, 40), (41, 90), (90, 90), (91, 200)):
        inputs = {"input_ids": rng.integers(0, TEXT_TOKENS, (2, count))}
        assert pack(config, **inputs, lengths=policy.lengths).tokens.shape == (2, slots)
        np.testing.assert_allclose(policy.logits(**inputs), pair[1].logits(**inputs), atol=1e-5)
    with pytest.raises(InputError, match="201 tokens is longer"):
        policy.logits(np.zeros((1, 201), int))


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 25)] == [1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 32]
    assert [bucket(n, 64) for n in (1, 64, 65, 97, 129, 193)] == [64, 64, 96, 128, 192, 256]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_slices_are_placed_without_overlap(sizes):
    rows, windows, places = place_slices(sizes)
    assert bucket(rows) == rows and bucket(windows) == windows == bucket(max(sizes))
    taken = np.zeros((rows, windows), int)
    for size, (row, start, _) in zip(sizes, places, strict=True):
        assert start + size <= windows
        taken[row, start : start + size] += 1
    assert taken.max() == 1 and taken.sum() == sum(sizes)
    assert len({(row, number) for row, _, number in places}) == len(sizes)
    # At most one row is less than half full, and buckets add at most half of the rows.
    assert rows <= max(1, 1.5 * (2 * sum(sizes) / windows + 1))


def test_what_does_not_belong_together_is_named(pair):
    policy = pair[1]
    talk = conversation(np.random.default_rng(3), policy.policy.config, 3, (0, 4, 6), 2, (2, 2, 4), 3)
    good = processor_output([talk])
    for change, words in (
        ({"image_grid_thw": np.array([[1, 4, 5]])}, "multiples of 2"),
        ({"image_grid_thw": np.array([[1, 4, 4]])}, "pixel values of the images have shape"),
        ({"image_grid_thw": None}, "images need both"),
        ({"image_grid_thw": None, "pixel_values": None}, "show more images than image_grid_thw has rows"),
        ({"input_ids": good["input_ids"][:, :6], "attention_mask": None}, "needs 6 image tokens in one block"),
        ({"input_ids": good["input_ids"][:, :3], "attention_mask": None}, "2 images or videos have no tokens"),
        ({"second_per_grid_ts": [1.0, 2.0]}, "2 values for 1 videos"),
        ({"attention_mask": np.ones((1, 3))}, "must both be"),
    ):
        with pytest.raises(InputError, match=words):
            policy.logits(**(good | change))


def test_saved_policy_says_the_same(pair, tmp_path):
    model, policy = pair
    policy.save(tmp_path / "out")
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = torch_batch(processor_output([talk_of("images and videos", policy)]))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_greedy_decoding_over_growing_conversations(pair):
    """Buckets and padding never change what comes next."""
    model, policy = pair
    talk = conversation(np.random.default_rng(5), policy.policy.config, 3, (2, 6, 8), 40)
    banned = list(range(TEXT_TOKENS, model.config.text_config.vocab_size))
    inputs = processor_output([talk])
    expected = model.generate(**torch_batch(inputs), max_new_tokens=6, do_sample=False, suppress_tokens=banned)
    said = []
    for _ in range(6):
        said.append(int(policy.logits(**inputs)[0, -1, :TEXT_TOKENS].argmax()))
        inputs["input_ids"] = np.append(inputs["input_ids"], [[said[-1]]], axis=1)
        inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    assert said == expected[0, len(talk.tokens) :].tolist()
