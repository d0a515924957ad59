"""Makes the small tokenizer of the embedded policy: Qwen2.5-VL's special tokens and chat format, few merges.

It differs from the published tokenizer in three ways, all for a model of a few million parameters: the vocabulary is
small; numbers are cut in runs of up to three digits and each of 0..999 is one token wherever it stands; and text is not
normalised, so that decoding gives back exactly what was encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from revseg_jax.errors import InputError
from revseg_jax.policy.config import VisionConfig
from revseg_jax.policy.preprocess import MEAN, STD

# The published order. True: special, removed by decode(..., skip_special_tokens=True).
SPECIAL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
}

# GPT-4-style splitting as in Qwen2, with two changes: digits go in runs of up to three, and a space between
# punctuation and a digit belongs to the punctuation (", " is one token), so that a number never has a space glued on.
SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+(?: (?=\p{N})|[\r\n]*)",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# The chat format of Qwen2.5-VL: a default system turn, and one placeholder for each image or video.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0, videos=0) -%}"
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}"
    "{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture %d: ' % seen.images -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' or 'video' in part -%}"
    "{%- set seen.videos = seen.videos + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video %d: ' % seen.videos -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}"
    "{{- part.text -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def build_tokenizer(corpus: Iterable[str], out: Path, vocab_size: int = 2048) -> int:
    """Trains on `corpus` and writes the tokenizer's files, the chat template and generation_config.json into `out`.

    Returns the size of the whole vocabulary, special tokens included (they come last): `vocab_size`, or less when the
    corpus has no more merges to give. The same corpus gives the same files. Raises InputError when `vocab_size` cannot
    hold the 256 bytes, the 990 numbers of two and three digits and the special tokens.
    """
    numbers = number_merges()
    room = vocab_size - 256 - len(numbers) - len(SPECIAL_TOKENS)
    if room < 0:
        raise InputError(f"vocab_size={vocab_size} is too small: the fixed tokens alone are {vocab_size - room}")
    merges = numbers + text_merges(corpus, 256 + room)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = split_then_bytes()
    tokenizer.decoder = decoders.ByteLevel()
    for token, special in SPECIAL_TOKENS.items():
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        # Not Qwen2Tokenizer: that class builds its own splitting rule and ignores the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": [
            token for token, special in SPECIAL_TOKENS.items() if special and token != "<|endoftext|>"
        ],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": stop, "pad_token_id": stop[1], "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return tokenizer.get_vocab_size()


def write_preprocessor(vision: VisionConfig, out: Path) -> None:
    """Writes the image and video processor configs into `out`, for users of the Hugging Face processor.

    Their limits are so wide (one token up to the published 16,384) that our square resizes pass unchanged.
    """
    common = {
        "min_pixels": vision.merged_patch_size**2,
        "max_pixels": 16384 * vision.merged_patch_size**2,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [round(float(value), 8) for value in MEAN],
        "image_std": [round(float(value), 8) for value in STD],
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", **common}
    video = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        **common,
        "do_sample_frames": False,
        "cap_pixels_per_frame": False,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (out / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


def split_then_bytes() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def number_merges() -> list[tuple[str, str]]:
    """Merges that make each of 10..99 and 100..999 one token. BPE applies the earliest merge of the list first."""
    pairs = [(str(tens), str(ones)) for tens in range(1, 10) for ones in range(10)]
    rank = {pair: index for index, pair in enumerate(pairs)}
    triples = []
    for number in range(100, 1000):
        a, b, c = str(number)
        left_first = rank[a, b] <= rank.get((b, c), len(pairs))
        triples.append((a + b, c) if left_first else (a, b + c))
    return pairs + triples


def text_merges(corpus: Iterable[str], size: int) -> list[tuple[str, str]]:
    """Up to `size` - 256 merges learned from the corpus. Every number counts as one digit, so none is learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_then_bytes()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((re.sub(r"\d+", "0", text) for text in corpus), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in learned]
