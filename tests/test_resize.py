"""The image resize equals Pillow's BILINEAR to the byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdreamer.envs.resize import bilinear_weights, enlarge_nearest, resize_images, resize_planes


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def pillow_columns_first(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow 13 chooses the order of the passes by the sizes; this fixes it."""
    return pillow(pillow(image, image.shape[0], width), height, width)


side = st.integers(1, 90)


@settings(max_examples=80, deadline=None)
@given(h=side, w=side, out_h=side, out_w=side, seed=st.integers(0, 99), extreme=st.booleans())
def test_resize_equals_pillow(
    h: int, w: int, out_h: int, out_w: int, seed: int, extreme: bool
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    if extreme:
        image = np.where(image > 127, 255, 0).astype(np.uint8)
    expected = pillow_columns_first(image, out_h, out_w)
    np.testing.assert_array_equal(resize_images(image, out_h, out_w), expected)
    expected = pillow_columns_first(image[..., 0], out_h, out_w)
    np.testing.assert_array_equal(resize_planes(image[..., 0], out_h, out_w), expected)


@pytest.mark.parametrize(
    ("size", "out"),
    [((210, 160), 64), ((210, 160), 96), ((84, 84), 64), ((480, 640), 64), ((64, 100), 64)],
)
def test_resize_batches_of_any_layout(size: tuple[int, int], out: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    images[2] = 255
    expected = np.stack([pillow(image, out, out) for image in images])
    channels_first = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    np.testing.assert_array_equal(resize_images(images, out, out), expected)
    strided = resize_images(np.moveaxis(channels_first, 1, -1), out, out)
    np.testing.assert_array_equal(strided, expected)
    assert strided.flags.c_contiguous


@pytest.mark.parametrize("out", [48, 64, 84, 96])
def test_atari_resize_equals_pillow_in_one_call(out: int) -> None:
    image = np.random.default_rng(out).integers(0, 256, (210, 160, 3), np.uint8)
    np.testing.assert_array_equal(resize_images(image, out, out), pillow(image, out, out))


def test_resize_edges() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    same = resize_images(image, 4, 4)
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    with pytest.raises(ValueError, match="uint8"):
        resize_planes(np.zeros((4, 4)), 2, 2)
    sums = bilinear_weights(210, 64).sum(1)
    assert abs(sums - (1 << 22)).max() <= 4
    board = np.array([[0, 1], [2, 3]])
    np.testing.assert_array_equal(
        enlarge_nearest(board, 4, 3), [[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3]]
    )
