"""FLOPs of a compiled program's matrix products."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np

from revseg_jax.compilation.hlo import Computation, Instruction


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Of a dot or a convolution (TPU programs write every matrix product as one)."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.instructions[name].arrays[0].shape for name in instruction.operands[:2])
    output = instruction.arrays[0].shape
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2.0 * math.prod(output) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, output_labels = labels.groups()
    flops = 2.0 * output[output_labels.index("b")] * output[output_labels.index("f")] * right[right_labels.index("i")]
    window = dict(
        re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or ("", ""))[1])
    )
    spatial = [label for label in output_labels if label.isdigit()]
    for number in sorted(spatial):
        axis = int(number)
        settings = {key: value.split("x")[axis] for key, value in window.items()}
        low = int(settings.get("pad", "0_0").split("_")[0])
        flops *= _pairs(
            output[output_labels.index(number)],
            right[right_labels.index(number)],
            left[left_labels.index(number)],
            int(settings.get("stride", 1)),
            low,
            int(settings.get("lhs_dilate", 1)),
            int(settings.get("rhs_dilate", 1)),
        )
    return flops


def cudnn_flops(instruction: Instruction) -> float:
    """Of cuDNN's attention, which names the shape [N, H, S, T] of its scores: two products forward, five backward."""
    target = re.search(r'custom_call_target="__cudnn\$fmha(\w+)"', instruction.attributes)
    if target is None:
        return 0.0
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^]]*)\]', instruction.attributes)[1]
    products = 5 if target[1].endswith("Backward") else 2
    seen = 0.5 if re.search(r'"mask_type": ?"CAUSAL"', instruction.attributes) else 1.0
    width = instruction.arrays[0].shape[-1]
    return 2.0 * products * seen * width * math.prod(int(size) for size in re.findall(r"\d+", scores))


@cache
def _pairs(
    outputs: int, kernel: int, inputs: int, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """How many pairs of an output and a kernel place meet a real input, along one spatial axis.

    TPU programs write batch axes as spatial ones in which each output meets one place.
    """
    positions = np.arange(outputs) * stride - low
    total = 0
    for place in range(kernel):
        at = positions + place * right_dilation
        total += int(((at >= 0) & (at % left_dilation == 0) & (at < inputs * left_dilation)).sum())
    return total
