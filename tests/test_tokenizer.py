"""The embedded policy's tokenizer, chat template and preprocessor, also as transformers loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_policy import random_model
from transformers import AutoProcessor, AutoTokenizer

from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_tokenizer
from revseg_jax.policy.config import read_config
from revseg_jax.policy.embedded_tokenizer import SPECIAL_TOKENS, build_tokenizer, write_preprocessor

CORPUS = [
    '<think>The red circle is largest in frame 12, when it leaves.</think>\n<answer>[{"frame_idx": 12}]</answer>',
    'Detect the blue star: <answer>[{"bbox_2d": [12, 34, 156, 78], "label": "blue star"}]</answer>',
] * 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A policy's folder but for its weights."""
    folder = tmp_path_factory.mktemp("policies") / "source"
    random_model(20).config.save_pretrained(folder)
    build_tokenizer(CORPUS, folder)
    write_preprocessor(read_config(folder).vision, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source)


def test_every_number_is_one_token_wherever_it_stands(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for number in range(1000):
        texts = ["{}", "[{}", ", {}", ",{}", " {}", "  {}", "a {}", "a{}", '": {},', "\n{}", "frame {}.", "-{}", "({})"]
        for text in texts:
            ids = tokenizer(text.format(number)).input_ids
            digits = [token for token in ids if any(map(str.isdigit, tokenizer.decode([token])))]
            assert digits == [vocabulary[str(number)]], text
    box = tokenizer("[12, 34, 56, 78]").input_ids
    assert [tokenizer.decode([token]) for token in box] == ["[", "12", ", ", "34", ", ", "56", ", ", "78", "]"]


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(st.sampled_from(" \n,.[]{}\"'0123456789abcé<|>/")))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer, source):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(f"a{token}b").input_ids) == 3
    assert tokenizer.decode(tokenizer("<|im_start|>a<|image_pad|>").input_ids, skip_special_tokens=True) == "a"
    published = (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    )
    assert set(f"{published} <|image_pad|> <|video_pad|>".split()) <= SPECIAL_TOKENS.keys()
    stop = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    assert stop[0] == tokenizer.eos_token_id


def test_vocabulary_size_is_known_and_bounded(tmp_path):
    assert build_tokenizer(CORPUS, tmp_path, vocab_size=1300) == 1300
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == 1300 and set(loaded.get_vocab().values()) == set(range(1300))
    with pytest.raises(InputError, match="vocab_size=1000 is too small"):
        build_tokenizer(CORPUS, tmp_path, vocab_size=1000)


def test_the_same_corpus_gives_the_same_tokenizer(source, tmp_path):
    code = "import sys, json, pathlib; from revseg_jax.policy.embedded_tokenizer import build_tokenizer\n"
    code += "build_tokenizer(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, json.dumps(CORPUS), str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_chat_template_writes_the_published_format(tokenizer):
    chat = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where is it?"}]},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": " Box \n"}]},
    ]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Where is it?<|im_end|>\n"
        "<|im_start|>assistant\nHere.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> Box \n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"
    chat.insert(0, {"role": "system", "content": "Be brief."})
    own = tokenizer.apply_chat_template(chat, tokenize=False)
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    numbered = tokenizer.apply_chat_template(chat, tokenize=False, add_vision_id=True)
    assert "Video 1: <|vision_start|>" in numbered and "Picture 1: <|vision_start|>" in numbered


def test_transformers_own_loaders_agree(tokenizer, source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = 'frame 7 of 16: [{"bbox_2d": [1, 22, 333, 4]}]<|im_end|>'
    assert AutoTokenizer.from_pretrained(source)(text).input_ids == tokenizer(text).input_ids
    processor = AutoProcessor.from_pretrained(source)
    inputs = processor(text="<|vision_start|><|image_pad|><|vision_end|>", images=np.zeros((32, 48, 3), np.uint8))
    patch = read_config(source).vision.patch_size
    assert inputs["image_grid_thw"].tolist() == [[1, 32 // patch, 48 // patch]]
