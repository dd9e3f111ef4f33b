"""Pictures: what decoding makes of all that is found, resizing, crops."""

from __future__ import annotations

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image
from data_pipelines.benchmark.shards import photo
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


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_other_modes_become_rgb(mode):
    grey = (
        Image.fromarray(photo(np.random.default_rng(0), 12, 17))
        .convert("L")
        .point(lambda x: x & 128)
    )
    out = decode(encoded(grey.convert(mode)))
    np.testing.assert_array_equal(out, np.asarray(grey.convert(mode).convert("RGB")))


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 75, "progressive": True},
        {"quality": 95, "subsampling": 0},
        {"quality": 90, "subsampling": "4:2:2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_what_pil_makes_of_it(mode, options):
    picture = Image.fromarray(photo(np.random.default_rng(0), 75, 101)).convert(mode)
    data = encoded(picture, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_cmyk_jpeg():
    array = photo(np.random.default_rng(0), 40, 50)
    data = encoded(Image.fromarray(array).convert("CMYK"), "JPEG", quality=98)
    assert np.abs(decode(data).astype(int) - array).mean() < 3


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    grey = decode(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(grey, np.repeat(values[..., None] >> 8, 3, axis=2))
    # Pillow writes no 16-bit colour: the same row three times over, by hand.
    import zlib

    row = np.repeat(values[0][:, None], 3, axis=1).astype(">u2").tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row))
    np.testing.assert_array_equal(decode(data + chunk(b"IEND", b"")), grey)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    red, blue = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (9, 7), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    out = decode(encoded(red, kind, save_all=True, append_images=[blue], **options))
    np.testing.assert_array_equal(out, np.asarray(red))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, kind):
    from PIL import ImageOps

    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, :16], array[8:, :16] = 250, 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(array), kind, exif=exif, quality=100)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data), np.asarray(expected))


def test_unreadable_exif_is_upright():
    array = pixels(8, 16)
    data = encoded(Image.fromarray(array), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert decode(data).shape == (8, 16, 3)


def test_forty_megapixels_and_one_pixel():
    large = Image.new("RGB", (8000, 5000), (10, 200, 30))
    out = decode(encoded(large, "JPEG"))
    assert out.shape == (5000, 8000, 3)
    assert np.abs(image.resize_square(out, 8).astype(int) - (10, 200, 30)).max() <= 2
    for kind in image.FORMATS:
        tiny = decode(encoded(Image.new("RGB", (1, 1), "white"), kind))
        assert tiny.shape == (1, 1, 3)
        for resize in image.RESIZES.values():
            np.testing.assert_array_equal(resize(tiny, 4), np.full((4, 4, 3), tiny[0, 0]))


def test_caps_are_checked_before_decoding():
    data = encode_png(pixels(8, 8))
    with pytest.raises(BadImageError, match=r"has \d+ bytes, more than the 10 allowed") as error:
        decode(data, max_bytes=10)
    assert error.value.reason == "too large"
    for kind in ("PNG", "JPEG", "GIF"):
        with pytest.raises(BadImageError, match="8 x 8 pixels, more than the 63") as error:
            decode(encoded(Image.fromarray(pixels(8, 8)), kind), max_pixels=63)
        assert error.value.reason == "too large"
    # Headers that promise 10,000 x 10,000 and 60,000 x 60,000 pixels in a few bytes.
    for side in (10_000, 60_000):
        with pytest.raises(BadImageError) as error:
            decode(png_of(side))
        assert error.value.reason == "too large"


def png_of(side: int) -> bytes:
    """A valid header of that size without pixels."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("kind", image.FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_data(kind, share):
    data = encoded(Image.fromarray(photo(np.random.default_rng(0), 60, 80)), kind)
    with pytest.raises(BadImageError) as error:
        decode(data[: round(share * len(data))])
    assert error.value.reason == "truncated"
    if kind == "JPEG":
        with pytest.raises(BadImageError) as error:
            decode(data[: round(share * len(data))] + b"\xff\xd9")


def test_a_jpeg_that_lost_its_middle_is_truncated_though_its_end_is_there():
    data = encoded(Image.fromarray(photo(np.random.default_rng(0), 60, 80)), "JPEG")
    with pytest.raises(BadImageError, match="premature end") as error:
        decode(data[: len(data) // 2] + b"\xff\xd9")
    assert error.value.reason == "truncated"


def test_stray_bytes_do_not_spoil_a_jpeg():
    data = encoded(Image.fromarray(pixels(16, 16)), "JPEG")
    stray = data[:-2] + b"stray" + data[-2:] + b"more"
    np.testing.assert_array_equal(decode(stray), decode(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a picture"),
        (b"\0" * 100, "not a picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
        (b"<!doctype html><title>404</title>", "not a picture"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "not a picture"),
        (b"GIF89a\0\0\0\0;", "broken"),
        (b"\xff\xd8\xff" + b"\0" * 99 + b"\xff\xd9", "broken"),
    ],
    ids=["empty", "zeros", "svg", "html", "tiff", "gif", "jpeg"],
)
def test_what_is_no_picture(data, reason):
    with pytest.raises(BadImageError) as error:
        decode(data)
    assert error.value.reason == reason
    assert "0x" not in str(error.value)  # no addresses: the same data gives the same sentence


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
    boxes = np.stack([image.crop_box(100, 100, rng, flip=0.5) for _ in range(300)])
    top, left, height, width, mirror = boxes.T
    assert ((width * height >= 4800) & (width * height <= 10_000)).all()
    assert ((width / height >= 0.73) & (width / height <= 1.37)).all()
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height).max() == (left + width).max() == 100
    assert 100 < mirror.sum() < 200


def test_crop_of_everything_is_a_resize():
    array = pixels(64, 64)
    out = image.random_resized_crop(array, 32, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(out, image.resize_square(array, 32))


def test_crop_falls_back_where_no_draw_fits():
    out = image.random_resized_crop(pixels(200, 2), 8, np.random.default_rng(0), scale=(1, 1))
    assert out.shape == (8, 8, 3)


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.14, 2.0, 5.0])
def test_fast_is_near_pil(ratio):
    found = []
    for seed in range(3):
        array = photo(np.random.default_rng(seed), 300, 260)
        rng = np.random.default_rng(seed)
        options = {"scale": (0.9, 1.0), "flip": 0.5}
        size = round(260 / ratio)
        exact = image.random_resized_crop(array, size, rng, resample="exact", **options)
        rng = np.random.default_rng(seed)
        found.append(
            np.abs(exact - image.random_resized_crop(array, size, rng, **options).astype(int))
        )
    assert np.mean(found) <= 0.3
    assert np.max(found) <= 16  # where values are clipped, the order of the axes shows


@pytest.mark.parametrize("size", [224, 150, 100])
def test_shrinking_does_not_alias(size):
    """A zone plate, whose frequency grows from the centre: what is too fine becomes grey."""
    y, x = np.mgrid[:512, :512] - 256
    plate = 127.5 + 127.5 * np.cos(np.pi * (x * x + y * y) / 512)
    plate = np.repeat(plate[..., None], 3, axis=2).astype(np.uint8)
    exact, fast = (
        image.resize_square(plate, size, kind).astype(float) for kind in ("exact", "fast")
    )
    nearest = plate[:: 512 // size, :: 512 // size]
    assert fast.var() == pytest.approx(exact.var(), rel=0.01)
    assert np.var(nearest) > 3 * fast.var()
    assert np.abs(exact - fast).mean() <= 0.3


def test_without_the_fast_resizer_it_is_exact(monkeypatch):
    array = photo(np.random.default_rng(0), 60, 70)
    exact = image.resize_square(array, 40, "exact")
    assert (image.resize_square(array, 40) != exact).any()
    monkeypatch.setattr(image, "fast", None)
    np.testing.assert_array_equal(image.resize_square(array, 40), exact)


def test_threads_do_not_disturb_each_other():
    arrays = [photo(np.random.default_rng(i), 90 + i, 70) for i in range(8)]
    alone = [image.resize_square(array, 40) for array in arrays]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda array: image.resize_square(array, 40), arrays)
            for expected, found in zip(alone, together):
                np.testing.assert_array_equal(found, expected)


def test_pad_puts_the_mean_colour_beside_the_picture():
    array = np.zeros((10, 30, 3), np.uint8)
    for resample in ("fast", "exact"):
        out = image.resize_pad(array, 30, resample)
        np.testing.assert_array_equal(out[10:20], array)
        assert (out[:10] == (123, 116, 103)).all() and (out[20:] == (123, 116, 103)).all()
    np.testing.assert_array_equal(image.resize_pad(array.transpose(1, 0, 2), 30)[:, 10:20], 0)


@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2)])
def test_strips_cost_no_more_than_other_pictures(shape):
    """Resized by its shorter side to 224, this strip would have a billion pixels."""
    array = np.full((*shape, 3), 77, np.uint8)
    assert (image.resize_center(array, 224) == 77).all()
    padded = image.resize_pad(array, 224)
    assert padded.shape == (224, 224, 3)
    assert (padded[:100, :100] == image.MEAN_COLOR).all()


def test_canvas_holds_the_picture():
    array = pixels(30, 20)
    out, valid = image.canvas(array, 40)
    assert valid == (30, 20)
    np.testing.assert_array_equal(out[:30, :20], array)
    assert not out[30:].any() and not out[:, 20:].any()
    out, valid = image.canvas(pixels(300, 20), 40)
    assert valid == (40, 3) and out[:40, :3].any() and not out[:, 3:].any()
