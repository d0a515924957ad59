"""Encoded frames in, pixels out: the only place that decodes, encodes or resizes frames."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from revseg_jax.errors import InputError

JPEG_QUALITY = 95
_TURNS = {  # by EXIF's Orientation: what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode_frame(frame: np.ndarray) -> bytes:
    """JPEG of a uint8 [H, W, 3] frame at quality 95 without chroma subsampling: thin coloured edges stay sharp."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_frame(jpeg: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an encoded frame. Raises InputError when the bytes are not a readable image."""
    return np.asarray(_decode(jpeg))


def decode_square(jpeg: bytes, size: int) -> np.ndarray:
    """`resize_square(decode_frame(jpeg), size)` without the two copies of the large frame that lie between."""
    return _resize(_decode(jpeg), size)


def resize_square(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], bicubic with antialiasing; x and y are scaled independently.

    It is what Hugging Face's Qwen2-VL image processor on Pillow does (`Qwen2VLImageProcessorPil` in transformers 5), so
    pixels agree with what published checkpoints were trained on. Everything shown to the policy goes through here.
    """
    return _resize(Image.fromarray(frame), size)


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data wants it shown; the very image when they want nothing, or are damaged.

    `ImageOps.exif_transpose` fails on damaged ones, as it writes the others anew, and always copies.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except SyntaxError:
        turn = None
    return image if turn is None else image.transpose(turn)


def _decode(jpeg: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"an encoded frame of {len(jpeg)} bytes cannot be decoded: {error}") from None


def _resize(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
