"""Square resizing of decoded frames."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize_square(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], bicubic with antialiasing (PIL), as Qwen2-VL's image processor."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))
