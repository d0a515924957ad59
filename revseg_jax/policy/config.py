"""Sizes of a Qwen2.5-VL model, read from and written to the checkpoint's own `config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revseg_jax.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int  # width of the text decoder that reads the merged tokens
    patch_size: int  # pixels
    temporal_patch_size: int  # frames fused into one patch
    spatial_merge_size: int  # merge_size x merge_size patches become one token
    window_size: int  # pixels
    fullatt_block_indexes: tuple[int, ...]  # every other block attends inside windows
    tokens_per_second: float  # temporal rotary positions per second of video
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_patch_size(self) -> int:
        """Side of the pixel square that one token stands for."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window_side(self) -> int:
        """Side of an attention window in merged patches."""
        return self.window_size // self.merged_patch_size


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]  # rotary frequencies that follow time, height, width
    rms_norm_eps: float
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


# transformers' defaults: some of its versions wrote only what differs from these.
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}
VISION_DEFAULTS = {
    "depth": 32,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "tokens_per_second": 4,
}
OBJECTS = ("text_config", "vision_config", "quantization_config", "rope_parameters", "rope_scaling")
REALS = ("rms_norm_eps", "rope_theta", "tokens_per_second")  # all other defaults are whole numbers
TOKEN_DEFAULTS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face `config.json` in either published layout (flat, or with a nested `text_config`).

    Keys that are absent have transformers' defaults. Raises InputError when it is not Qwen2.5-VL's, when a key without
    a default is missing, or when a value is not one that such a model can have; all such keys are named.
    """
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen2_5_vl":
        kind = raw.get("model_type") if isinstance(raw, dict) else raw
        raise InputError(f"{where}: model_type is {kind!r:.80}, not 'qwen2_5_vl'")
    parts = {"": raw} | {f"{key}.": raw.get(key) or {} for key in ("text_config", "vision_config")}
    objects = {
        f"{key}{name}": part.get(name) for key, part in parts.items() if isinstance(part, dict) for name in OBJECTS
    }
    wrong = [f"{key}={value!r:.80}" for key, value in objects.items() if not isinstance(value, dict | None)]
    if wrong:
        raise InputError(f"{where}: not objects: {', '.join(wrong)}")
    nested = _given(raw.get("text_config"))
    text_raw = {**TEXT_DEFAULTS, **_given(raw), **nested}
    if {**raw, **parts["text_config."]}.get("num_key_value_heads", 0) is None:  # given as null: not its default
        text_raw["num_key_value_heads"] = text_raw["num_attention_heads"]
    vision_raw = {**VISION_DEFAULTS, **_given(raw.get("vision_config"))}
    tokens = {**TOKEN_DEFAULTS, **_given(raw)}
    rope = _given(text_raw.get("rope_parameters") or text_raw.get("rope_scaling"))
    vision_rope = _given(vision_raw.get("rope_parameters"))
    missing = [] if "hidden_size" in vision_raw else ["vision_config.hidden_size"]
    missing += [] if "mrope_section" in rope else ["rope_scaling.mrope_section"]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    supported = {
        "hidden_act": (text_raw.get("hidden_act", "silu"), ("silu",)),
        "vision_config.hidden_act": (vision_raw.get("hidden_act", "silu"), ("silu",)),
        "use_sliding_window": (text_raw.get("use_sliding_window", False), (False,)),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
        "vision rope_theta": (vision_rope.get("rope_theta", 10000.0), (10000.0,)),
        "quantization_config.quant_method": (_given(raw.get("quantization_config")).get("quant_method"), (None,)),
    }
    unsupported = [f"{key}={value!r}" for key, (value, allowed) in supported.items() if value not in allowed]
    if unsupported:
        raise InputError(f"{where}: not supported: {', '.join(unsupported)}")
    sizes = [(key, text_raw[key]) for key in (*TEXT_DEFAULTS, "head_dim") if key in text_raw and key not in REALS]
    sizes += [
        (f"vision_config.{key}", vision_raw[key]) for key in ("hidden_size", *VISION_DEFAULTS) if key not in REALS
    ]
    sizes += [(key, tokens[key]) for key in TOKEN_DEFAULTS]
    wrong = [f"{key}={value!r}" for key, value in sizes if not _is_count(key, value)]
    if wrong:
        raise InputError(f"{where}: not whole numbers above 0: {', '.join(wrong)}")
    reals = {**text_raw, **rope, "tokens_per_second": vision_raw["tokens_per_second"]}
    wrong = [f"{key}={reals[key]!r}" for key in REALS if not (_is_number(reals[key]) and reals[key] > 0)]
    if wrong:
        raise InputError(f"{where}: not numbers above 0: {', '.join(wrong)}")
    heads, sections = text_raw["num_attention_heads"], rope["mrope_section"]
    if not isinstance(sections, list | tuple) or len(sections) != 3 or any(type(part) is not int for part in sections):
        raise InputError(f"{where}: mrope_section={sections!r} is not three whole numbers")
    head_dim = text_raw.get("head_dim", text_raw["hidden_size"] // heads)
    if 2 * sum(sections) != head_dim:
        raise InputError(f"{where}: mrope_section {list(sections)} does not add up to half of a head's {head_dim}")
    text = TextConfig(
        vocab_size=text_raw["vocab_size"],
        hidden_size=text_raw["hidden_size"],
        intermediate_size=text_raw["intermediate_size"],
        num_layers=text_raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text_raw["num_key_value_heads"],
        head_dim=head_dim,
        rope_theta=float(reals["rope_theta"]),
        mrope_section=tuple(sections),
        rms_norm_eps=text_raw["rms_norm_eps"],
        # As in transformers: versions before 5 wrote it into text_config, and false beside it.
        tie_word_embeddings=any(part.get("tie_word_embeddings", False) for part in (raw, nested)),
    )
    vision_raw["fullatt_block_indexes"] = tuple(vision_raw["fullatt_block_indexes"])
    vision = VisionConfig(
        **{key: vision_raw[key] for key in ("hidden_size", *VISION_DEFAULTS)},
        in_channels=vision_raw.get("in_channels", vision_raw.get("in_chans", 3)),
    )
    return ModelConfig(vision, text, **{key: tokens[key] for key in TOKEN_DEFAULTS})


def _given(part: dict[str, Any] | None) -> dict[str, Any]:
    """Without the keys that are null: they have their defaults."""
    return {key: value for key, value in (part or {}).items() if value is not None}


def _is_count(key: str, value: Any) -> bool:
    """A whole number above 0, or of layers several of them, 0 among them."""
    if key == "vision_config.fullatt_block_indexes":
        return isinstance(value, list | tuple) and all(type(each) is int and each >= 0 for each in value)
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model that was not read from one, in the nested layout transformers 5 writes."""
    text, vision = config.text, config.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "tie_word_embeddings": text.tie_word_embeddings,
            "bos_token_id": None,  # transformers would fill in the published sizes', which may not exist here
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_section),
            },
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            **dataclasses.asdict(vision),
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "hidden_act": "silu",
        },
    }


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder. Raises InputError when it is missing or not Qwen2.5-VL."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: a policy folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    return from_hf(raw, str(path))


def _published(width: int, inner: int, layers: int, heads: int, key_heads: int, vision_inner: int) -> ModelConfig:
    return from_hf(
        {
            "model_type": "qwen2_5_vl",
            "vocab_size": 151936 if width == 2048 else 152064,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": width == 2048,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": vision_inner,
                "num_heads": 16,
                "out_hidden_size": width,
                "patch_size": 14,
                "tokens_per_second": 2,
            },
        }
    )


# The published models' sizes, for what needs no weights. Where there is a checkpoint its own config.json counts.
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": _published(2048, 11008, 36, 16, 2, 3420),
    "Qwen2.5-VL-7B-Instruct": _published(3584, 18944, 28, 28, 4, 3420),
    "Qwen2.5-VL-32B-Instruct": _published(5120, 27648, 64, 40, 8, 3456),
    "Qwen2.5-VL-72B-Instruct": _published(8192, 29568, 80, 64, 8, 3456),
}
