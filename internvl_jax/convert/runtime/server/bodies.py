"""The requests, checked, and their pictures."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .limits import Limits, Refusal

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DATA_URI = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,20}:", re.ASCII | re.IGNORECASE)


class Body(BaseModel):
    """A JSON object with known fields and no others; 1 is no float's string and no bool."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Search(Body):
    """How to generate, see `Settings` in ``generate.py``; null for the model's own way."""

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    num_beams: int | None = Field(None, ge=1)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)

    def settings(self, make: Callable[..., Any], limits: Limits) -> Any:
        """Settings with what the request asks for, the model's own length cut to the limit.

        Args:
            make: from changes to settings; ValueError for what doesn't go together.
            limits: of tokens and beams.

        Raises:
            Refusal: 400, for what exceeds the limits or doesn't go together.
        """
        asked = {name: getattr(self, name) for name in Search.model_fields}
        asked = {name: value for name, value in asked.items() if value is not None}
        for name, most in (("max_new_tokens", limits.new_tokens), ("num_beams", limits.beams)):
            if asked.get(name, 1) > most:
                raise Refusal(400, f"{name} is at most {most} here.", param=name)
        if "do_sample" not in asked and {"temperature", "top_k", "top_p"} & set(asked):
            asked["do_sample"] = True
        if asked.get("do_sample"):
            asked.setdefault("num_beams", 1)  # whatever the model's own search is
        try:
            found = make(**asked)
            if found.max_new_tokens > limits.new_tokens:  # the model's own length
                found = make(**asked, max_new_tokens=limits.new_tokens)
            return found
        except ValueError as error:
            raise Refusal(400, str(error)) from None


class EmbedImage(Body):
    """``POST /embed/image``: pictures as data URIs or base64."""

    images: list[str] = Field(min_length=1)
    mode: Literal["C", "G"] = "C"


class EmbedText(Body):
    """``POST /embed/text``."""

    texts: list[str] = Field(min_length=1)


class Score(Body):
    """``POST /score``: every picture against every text."""

    images: list[str] = Field(min_length=1)
    texts: list[str] = Field(min_length=1)
    mode: Literal["C", "G", "ITM"] = "C"


class Caption(Search):
    """``POST /caption``: one caption per picture, after a prompt or in a language."""

    images: list[str] = Field(min_length=1)
    prompt: str | None = None
    language: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Caption:
        if self.prompt is not None and self.language is not None:
            raise ValueError("give a prompt or a language, not both")
        return self


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], data: bytes | bytearray, limits: Limits) -> Kind:
    """A JSON body, checked.

    Args:
        kind: what it should be.
        data: UTF-8 JSON.
        limits: of its elements, texts and pictures.

    Raises:
        Refusal: 400 or 413, one sentence about the first thing that is wrong.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > limits.body_elements:
        raise Refusal(413, f"The body has more than {limits.body_elements} elements: send fewer.")
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        # Of the alternatives that a field allows, the deepest complaint is about the one meant.
        first = max(error.errors(include_url=False, include_input=False), key=_depth)
        raise _refusal(first) from None
    _check(body, limits)
    return body


def _depth(error: Any) -> int:
    return len(error["loc"])


def _refusal(error: Any) -> Refusal:
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"])
    where = where.lstrip(".")[:80]
    if error["type"] == "extra_forbidden":
        return Refusal(400, f"{where} is not supported: leave it out.", param=where)
    problem = error["msg"].removeprefix("Value error, ").rstrip(".")[:300]
    return Refusal(400, f"{where or 'The body'}: {problem}.", param=where or None)


def _check(body: Body, limits: Limits) -> None:
    for name, most in (("images", limits.images), ("texts", limits.texts)):
        if len(getattr(body, name, ())) > most:
            raise Refusal(413, f"{name} holds more than {most}: send fewer at a time.", param=name)
    for name in ("texts", "prompt"):
        value = getattr(body, name, None) or []
        check_texts([value] if isinstance(value, str) else value, limits, name)


def check_texts(texts: list[str], limits: Limits, where: str) -> None:
    """Refuses (413) a text that is too long."""
    if any(len(text) > limits.text_chars for text in texts):
        raise Refusal(
            413, f"{where} holds a text of more than {limits.text_chars} characters.", param=where
        )


def picture_data(text: str, limits: Limits, where: str, *, bare: bool = True) -> bytes:
    """The encoded picture in a data URI; nothing is ever fetched or opened.

    Args:
        text: ``data:image/…;base64,…``.
        limits: of its bytes.
        where: the field, for messages.
        bare: whether base64 alone will do.

    Raises:
        Refusal: 400 or 413.
    """
    if found := DATA_URI.match(text):
        text = text[found.end() :]
    elif text[:5].lower() == "data:":
        raise Refusal(400, f"{where} is no picture: use data:image/...;base64,... .", param=where)
    elif SCHEME.match(text) or not bare:
        raise Refusal(
            400,
            f"{where} is no data URI, and URLs are not fetched: send the picture itself as "
            "data:image/...;base64,... .",
            param=where,
        )
    if len(text) > limits.image_bytes * 4 // 3 + 4:
        raise too_many_bytes(limits, where)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{where} is no valid base64.", param=where) from None
    check_bytes(data, limits, where)
    return data


def check_bytes(data: bytes, limits: Limits, where: str) -> None:
    """Refuses (400, 413) a picture with no or too many bytes."""
    if not data:
        raise Refusal(400, f"{where} is empty.", param=where)
    if len(data) > limits.image_bytes:
        raise too_many_bytes(limits, where)


def too_many_bytes(limits: Limits, where: str) -> Refusal:
    return Refusal(
        413, f"{where} has more than {limits.image_bytes} bytes: send it smaller.", param=where
    )


def check_pixels(data: bytes, limits: Limits, where: str) -> None:
    """Refuses a picture by the pixels its header declares; they are not decoded.

    Raises:
        Refusal: 400 if it is no picture, 413 if it is too large.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = limits.image_pixels + 1
    except Exception:  # readers raise anything at all on broken data
        raise Refusal(
            400, f"{where} is no readable picture of {', '.join(FORMATS)}.", param=where
        ) from None
    if pixels > limits.image_pixels:
        raise Refusal(
            413,
            f"{where} has more than {limits.image_pixels} pixels: send it smaller.",
            param=where,
        )
