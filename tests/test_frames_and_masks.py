"""Which frames are sampled, masks as runs and as pixels, and frames decoded and resized."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import ExifTags, Image, ImageOps

from revseg_jax.data.clip import boxes_and_areas, decode_frame, decode_mask, encode_mask, union
from revseg_jax.data.frames import encode_frame, resize_square, upright
from revseg_jax.data.sampling import sample_frames
from revseg_jax.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 64))
def test_sampling(total, wanted):
    indices = sample_frames(total, wanted)
    assert indices.dtype == np.int64 and len(indices) == min(total, wanted)
    assert 0 <= indices[0] and indices[-1] < total and (np.diff(indices) > 0).all()
    if len(indices) > 1:
        assert indices[0] == 0 and indices[-1] == total - 1
        # Uniform: never further than half a frame from the exact position.
        assert np.abs(indices - np.linspace(0, total - 1, len(indices))).max() <= 0.5 + 1e-9
    if total <= wanted:
        assert indices.tolist() == list(range(total))


@pytest.mark.parametrize("arguments", [(0, 8), (5, 0), (-1, 3)])
def test_sampling_nothing(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        sample_frames(*arguments)


masks_of_a_frame = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


@settings(deadline=None)
@given(masks_of_a_frame)
def test_boxes_from_runs_equal_boxes_from_pixels(mask):
    height, width = mask.shape
    boxes, areas = boxes_and_areas([encode_mask(mask), None], height, width)
    rows, columns = np.nonzero(mask)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if mask.any() else [0, 0, 0, 0]
    assert boxes.dtype == areas.dtype == np.float32
    assert boxes.tolist() == [expected, [0, 0, 0, 0]]
    assert areas.tolist() == [(expected[2] - expected[0]) * (expected[3] - expected[1]), 0]


@settings(deadline=None)
@given(st.data())
def test_masks_round_trip_and_unite(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    masks = data.draw(hnp.arrays(bool, (3, *shape)))
    rles = [encode_mask(mask) for mask in masks]
    for mask, rle in zip(masks, rles, strict=True):
        np.testing.assert_array_equal(decode_mask(rle, *shape), mask)
    united = union(rles)
    np.testing.assert_array_equal(decode_mask(united, *shape), masks.any(0))
    assert (
        boxes_and_areas([united], *shape)[0].tolist()
        == boxes_and_areas([encode_mask(masks.any(0))], *shape)[0].tolist()
    )
    assert (united is None) == (not masks.any())


def test_masks_of_another_size_are_refused():
    rle = encode_mask(np.ones((4, 6), bool))
    with pytest.raises(InputError, match="6x4"):
        decode_mask(rle, 6, 4)
    with pytest.raises(InputError, match="6x4"):
        boxes_and_areas([rle], 6, 4)


def test_frames_that_are_no_images_are_refused():
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_frame(b"not a jpeg")
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_frame(encode_frame(np.zeros((40, 40, 3), np.uint8))[:300])


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are none of EXIF's
def test_images_are_turned_upright_as_pillow_does(orientation):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).save(buffer, "PNG", exif=exif)
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(np.asarray(upright(image)), np.asarray(ImageOps.exif_transpose(image)))


def test_exif_data_may_be_damaged():
    """What is not EXIF turns nothing; a damaged tag beside the orientation (a width in letters) does not matter."""
    oriented = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 2, ExifTags.Base.Orientation, 3, 1, 6)
    oriented += struct.pack("<HHIII", ExifTags.Base.ImageWidth, 2, 1, ord("x"), 0)
    sizes = []
    for exif in (b"Exif\0\0no TIFF header", oriented):
        buffer = io.BytesIO()
        Image.new("L", (3, 2)).save(buffer, "JPEG", dpi=(72, 72), exif=exif)
        with Image.open(buffer) as image:
            sizes.append(upright(image).size)
    assert sizes == [(3, 2), (2, 3)]


def test_resizing_averages_instead_of_skipping_pixels():
    """A fine chequerboard becomes even grey (skipping pixels would keep black and white), x and y scale separately."""
    y, x = np.mgrid[:96, :160]
    board = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    inner = resize_square(board, 24)[3:-3, 3:-3].astype(int)
    assert inner.shape == (18, 18, 3) and np.abs(inner - 127.5).max() < 8
    halves = np.zeros((40, 100, 3), np.uint8)
    halves[:, 50:] = 255
    small = resize_square(halves, 20)
    assert (small[:, :8] == 0).all() and (small[:, 12:] == 255).all()


@pytest.mark.slow
def test_resizing_equals_hugging_face():
    image_transforms = pytest.importorskip("transformers.image_transforms")
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    for size in (28, 112, 168):
        expected = image_transforms.resize(frame, (size, size), resample=3)  # 3 is PIL's BICUBIC
        np.testing.assert_array_equal(resize_square(frame, size), expected)
