"""Pictures and texts become the same pixels and ids as in training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image as trained
from data_pipelines.text import Tokenizer
from internvl_jax.batch import (
    IMAGE_PLACEHOLDER,
    MEAN,
    STD,
    SUMMARIZE,
    TEMPLATES,
    caption_prompt,
    tokenize,
)

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime.config import (  # noqa: E402
    FolderError,
    ImageConfig,
    Template,
    TextConfig,
)
from internvl_jax.convert.runtime.image import PictureError, decode, picture, resize  # noqa: E402
from internvl_jax.convert.runtime.text import Tokenizer as Theirs  # noqa: E402

RNG = np.random.default_rng(3)
NAMES = {"squash": "square", "crop": "center", "pad": "pad"}


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (16, 16), (7, 300), (1, 1)], ids=str)
def test_resizes_are_those_of_training(how: str, shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
    expected = trained.RESIZES[NAMES[how]](pixels, 16, "exact")
    np.testing.assert_array_equal(resize(pixels, ImageConfig(16, how, MEAN, STD)), expected)


def photos() -> dict[str, bytes]:
    colour = RNG.integers(0, 256, (9, 14, 3), np.uint8)
    smooth = np.array(Image.fromarray(colour[:4, :4]).resize((40, 24)))
    grey16 = RNG.integers(0, 65536, (5, 6), np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "png": encoded(colour, "PNG"),
        "jpeg": encoded(smooth, "JPEG"),
        "turned": encoded(smooth, "JPEG", exif=turned),
        "alpha": encoded(RNG.integers(0, 256, (5, 6, 4), np.uint8), "PNG"),
        "grey": encoded(colour[..., 0], "PNG"),
        "16 bits": encoded(grey16, "PNG"),
        "webp": encoded(smooth, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("name", photos())
def test_files_are_decoded_alike(name: str) -> None:
    data = photos()[name]
    np.testing.assert_array_equal(decode(data), trained.decode(data))
    shown = picture(data, ImageConfig(8, "squash", MEAN, STD))
    assert shown.pixels.shape == (8, 8, 3)
    assert (shown.height, shown.width) == trained.decode(data).shape[:2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no readable picture"),
        (photos()["png"][:60], "cannot be decoded"),
        (photos()["jpeg"][:200], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "picture"),
    ],
    ids=["empty", "svg", "half png", "half jpeg", "no png"],
)
def test_what_is_no_picture_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(PictureError, match=said):
        decode(data)


def test_what_is_too_large_is_refused_unread() -> None:
    data = photos()["png"]
    with pytest.raises(PictureError, match="14 x 9 pixels, more than the 100 allowed"):
        decode(data, max_pixels=100)
    with pytest.raises(PictureError, match="bytes, more than the 50 allowed"):
        decode(data, max_bytes=50)


def text_config(ours: Tokenizer, template: str = "vicuna_v1", length: int = 8) -> TextConfig:
    shown = TEMPLATES[template]
    return TextConfig(
        tokenizer="tokenizer.model",
        length=length,
        bos_id=1,
        eos_id=2,
        pad_id=ours.pad_id,
        prefix=SUMMARIZE,
        prompts={"en": caption_prompt("en")},
        template=Template(shown.system, shown.user, shown.assistant, shown.roles),
    )


def test_texts_become_the_same_rows(tokenizer: Path) -> None:
    ours = Tokenizer(tokenizer)
    texts = ["a cat", "", "猫 a photo of red dog red dog a photo of cat", "x\n</s> y"]
    theirs = Theirs(tokenizer.parent, text_config(ours))
    ids, lengths = theirs.rows(texts, SUMMARIZE)
    expected, mask = ours.encode_batch([SUMMARIZE + t for t in texts], 8)
    np.testing.assert_array_equal(lengths, mask.sum(1))
    np.testing.assert_array_equal(ids, expected[:, : ids.shape[1]])
    assert theirs.prompt("English caption:") == [1, *ours.ids("English caption:")]
    some = [1, 5, 9, 0, 40, ours.pad_id, 10**6, -200, 2]
    assert theirs.decode(some) == ours.decode(some)


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_become_the_same_rows(template: str, tokenizer: Path) -> None:
    ours = Tokenizer(tokenizer)
    theirs = Theirs(tokenizer.parent, text_config(ours, template))
    turns = [
        {"from": "human", "value": f"what is this {IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}?\n"},
        {"from": "gpt", "value": " a red cat "},
        {"from": "human", "value": "  is it red"},
    ]
    for count in (1, 3):
        expected, _ = tokenize(
            TEMPLATES[template].segments(turns[:count]),
            ours.ids,
            bos=1,
            eos=2,
            visual_tokens=5,
        )
        assert theirs.conversation(turns[:count], 5) == expected.tolist()
    for wrong in ([], turns[:2], turns[1:], [turns[0], turns[0], turns[0]]):
        with pytest.raises(ValueError, match=r"question|alternate"):
            theirs.conversation(wrong, 5)


def test_a_tokenizer_that_is_none(tokenizer: Path, tmp_path: Path) -> None:
    config = text_config(Tokenizer(tokenizer))
    with pytest.raises(FolderError, match="lacks tokenizer"):
        Theirs(tmp_path, config)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(FolderError, match="not a sentencepiece model"):
        Theirs(tmp_path, config)
