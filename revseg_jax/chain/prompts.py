"""The text of a whole chain in the chat format of Qwen2.5-VL (ChatML), built from the templates in `ChainConfig`.

    prefix_text          system and user turn 1 with the video, up to where the policy starts to write
    answer 1             sampled; ends with <|im_end|>, which is the policy's own token
    turn2_prompt_text    user turn 2 with the keyframe, again up to where the policy starts to write
    answer 2             sampled; ends with <|im_end|>

In a chain of one turn (`chain.turns=1`) answer 1 is the last.

A video or an image is one placeholder token here; the tokenising side repeats it once per visual token. Queries come
from users and descriptions from the policy: neither can bring in a special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from revseg_jax.chain.parsing import BOX_KEYS, DESCRIPTION_KEY, FRAME_KEY
from revseg_jax.config import ChainConfig
from revseg_jax.errors import InputError

IM_END = "<|im_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DESCRIPTION_LIMIT = 200  # characters


def prefix_text(chain: ChainConfig, query: str, frames: int, seconds: float) -> str:
    """What all rollouts of a prompt share. `frames` is the number really shown, `seconds` the length of the video."""
    system = f"<|im_start|>system\n{plain_text(chain.system_prompt)}{IM_END}\n"
    return (
        f"{system}<|im_start|>user\n{VIDEO}{turn1_text(chain, query, frames, seconds)}{IM_END}\n<|im_start|>assistant\n"
    )


def turn2_prompt_text(chain: ChainConfig, description: str, limit: int = DESCRIPTION_LIMIT) -> str:
    """What comes between the <|im_end|> of the first answer and the second answer."""
    text = turn2_text(chain, description, limit)
    return f"\n<|im_start|>user\n{IMAGE}{text}{IM_END}\n<|im_start|>assistant\n"


def conversation_text(
    chain: ChainConfig, query: str, frames: int, seconds: float, answer1: str, description: str, answer2: str
) -> str:
    """The whole chain, equal to what the chat template of the checkpoint gives. The answers come without <|im_end|>."""
    first = prefix_text(chain, query, frames, seconds) + answer1 + IM_END
    return f"{first}{turn2_prompt_text(chain, description)}{answer2}{IM_END}\n"


def turn1_text(chain: ChainConfig, query: str, frames: int, seconds: float) -> str:
    """The user's words of turn 1, without markup."""
    template = chain.turn1_prompt if chain.turns == 2 else chain.one_turn_prompt
    return plain_text(template.format(query=one_line(query), frames=frames, seconds=seconds, fps=chain.fps))


def turn2_text(chain: ChainConfig, description: str, limit: int = DESCRIPTION_LIMIT) -> str:
    """The user's words of turn 2, without markup. At most `limit` characters of the description are used."""
    return plain_text(chain.turn2_prompt.format(description=one_line(description)[:limit].rstrip()))


def turn1_answer(thought: str, frame_idx: int, description: str) -> str:
    """A first answer that follows every rule, for supervised examples. Without <|im_end|>."""
    answer = json.dumps([{FRAME_KEY: frame_idx, DESCRIPTION_KEY: description}], ensure_ascii=False)
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def turn2_answer(box: Sequence[float], label: str) -> str:
    """A second answer that follows every rule; `box` in keyframe pixels is rounded to integers. Without <|im_end|>."""
    answer = json.dumps([{"label": label, BOX_KEYS[0]: [round(v) for v in box]}], ensure_ascii=False)
    return f"<answer>{answer}</answer>"


def plain_text(text: str) -> str:
    """The text with every `<|` broken up, so that it holds no special token, and without lone surrogates."""
    return text.replace("<|", "< |").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str) -> str:
    return " ".join(text.split())


def validate_templates(chain: ChainConfig) -> None:
    """Raises InputError when a prompt template cannot be filled in, leaves out its text, or holds special tokens."""
    turn1 = {"query": "<query>", "frames": chain.frames, "seconds": 1.0, "fps": chain.fps}
    for name, template, fields, wanted in (
        ("system_prompt", chain.system_prompt, None, None),
        ("turn1_prompt", chain.turn1_prompt, turn1, "query"),
        ("turn2_prompt", chain.turn2_prompt, {"description": "<description>"}, "description"),
        ("one_turn_prompt", chain.one_turn_prompt, turn1, "query"),
    ):
        if "<|" in template:
            raise InputError(f"chain.{name} holds '<|': special tokens are added by the program, write the words only")
        if fields is None:
            continue
        known = ", ".join(f"{{{key}}}" for key in fields)
        try:
            text = template.format(**fields)
        except KeyError as error:
            raise InputError(f"chain.{name} has an unknown field {{{error.args[0]}}}; known are {known}") from None
        except (IndexError, ValueError, AttributeError, TypeError) as error:
            hint = "write {{ and }} for braces that are text"
            raise InputError(f"chain.{name} is no valid template ({error}); fields are {known}; {hint}") from None
        if fields[wanted] not in text:
            raise InputError(f"chain.{name} leaves out {{{wanted}}}")
