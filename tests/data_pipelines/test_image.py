"""Pictures: caps, transparency, crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image
from data_pipelines.image import BadImageError, decode, encode_png


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_png_round_trip():
    array = pixels(5, 7)
    out = decode(encode_png(array))
    np.testing.assert_array_equal(out, array)
    assert out.dtype == np.uint8


def test_transparency_becomes_white_in_proportion():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    out = decode(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(out[0, :, 0], [255, 127, 0])


def test_palette_with_a_transparent_colour():
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    out = decode(encoded(picture, transparency=0))
    np.testing.assert_array_equal(out[0], [[255, 255, 255], [40, 50, 60]])


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (4, 3)), kind)).shape == (3, 4, 3)


def test_caps_are_checked_before_decoding():
    data = encode_png(pixels(8, 8))
    with pytest.raises(BadImageError, match=r"has \d+ bytes, more than the 10 allowed"):
        decode(data, max_bytes=10)
    with pytest.raises(BadImageError, match="8 x 8 pixels, more than the 63 allowed"):
        decode(data, max_pixels=63)
    # A header that promises 60,000 x 60,000 pixels in a few bytes.
    header = data[:16] + (60_000).to_bytes(4, "big") * 2 + data[24:]
    with pytest.raises(BadImageError):
        decode(header)


@pytest.mark.parametrize("cut", [0, 10, 40, 120])
def test_broken_data(cut):
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(encode_png(pixels(8, 8))[:cut])


def test_formats_that_are_not_listed_are_refused():
    with pytest.raises(BadImageError):
        decode(encoded(Image.new("RGB", (4, 4)), "TIFF"))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (64, 31), (30, 100), (7, 9)])
def test_resizes(height, width):
    array = pixels(height, width)
    for name, resize in image.RESIZES.items():
        assert resize(array, 40).shape == (40, 40, 3), name
    np.testing.assert_array_equal(image.resize_square(pixels(40, 40), 40), pixels(40, 40))


def test_center_keeps_the_middle():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = 200
    out = image.resize_center(array, 10)
    np.testing.assert_array_equal(out, array[:, 10:20])


def test_crop_is_a_function_of_the_generator():
    array = pixels(64, 48)

    def crop(seed, size=40, **options):
        return image.random_resized_crop(array, size, np.random.default_rng(seed), **options)

    np.testing.assert_array_equal(crop(1), crop(1))
    assert (crop(1) != crop(2)).any()
    np.testing.assert_array_equal(crop(3, flip=1.0), crop(3, flip=0.0)[:, ::-1])


def test_crop_keeps_the_share_of_the_area():
    rng = np.random.default_rng(0)
    for _ in range(300):
        _, _, width, height = image._crop_box(100, 100, rng, (0.5, 1.0), (3 / 4, 4 / 3))
        assert 0.48 <= width * height / 1e4 <= 1.0
        assert 0.73 <= width / height <= 1.37


def test_crop_of_everything_is_a_resize():
    array = pixels(64, 64)
    out = image.random_resized_crop(array, 32, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(out, image.resize_square(array, 32))


def test_crop_falls_back_where_no_draw_fits():
    out = image.random_resized_crop(pixels(200, 2), 8, np.random.default_rng(0), scale=(1, 1))
    assert out.shape == (8, 8, 3)
