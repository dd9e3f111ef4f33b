"""From the fields of a record to a sample: which field is the picture, which the caption."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines.sample import BadRecordError, Caption, Sample, Turn
from data_pipelines.sources import Fields
from internvl_jax.batch import IMAGE_PLACEHOLDER, LANGUAGES

Kind = Literal["pairs", "conversations"]

KNOWN = {
    "image": ("jpg", "jpeg", "png", "webp", "image", "images", "picture"),
    "caption": ("txt", "caption", "captions", "text", "TEXT", "json/caption", "json/text"),
    "language": ("language", "lang", "LANGUAGE", "json/language", "json/lang", "json/LANGUAGE"),
    "key": ("__key__", "key", "id", "uid"),
    "conversations": ("conversations", "json/conversations"),
}
"""The names by which fields are found where none is given."""
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """Which fields hold what; of several names the first that a record has counts.

    A name "json/caption" that is no field is the entry "caption" of the JSON in the field "json".

    Attributes:
        image: encoded picture, or several.
        caption: text, or several.
        language: code of the caption's language; "=it" is no field but the language of all.
        key: what to call the record.
        conversations: LLaVA's list of {from, value}, or its JSON.
    """

    image: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    conversations: tuple[str, ...] = ()


def guess(fields: Fields, given: Mapping[str, str], where: str) -> tuple[FieldNames, Kind]:
    """Finds out which field is what by looking at a record.

    Args:
        fields: of the first record.
        given: what the user said: role -> field.
        where: what to call the set in errors.

    Returns:
        The names, and "conversations" where the record has one, else "pairs".

    Raises:
        ValueError: if there is no caption or no picture, or a field that was named is not there.
    """
    names: dict[str, tuple[str, ...]] = {}
    for role, known in KNOWN.items():
        name = given.get(role)
        if name and not name.startswith("=") and not _has(fields, name):
            raise ValueError(
                f"{where} has no field {name!r} for the {role}; its first record has "
                f"{_described(fields)}."
            )
        # A tar may hold its pictures under several extensions, so the image keeps all names.
        found = known if role == "image" else tuple(n for n in known if _has(fields, n))
        names[role] = (name,) if name else found
    kind: Kind = "conversations" if names["conversations"] and "caption" not in given else "pairs"
    for role in ("image", "caption") if kind == "pairs" else ():
        if not any(_has(fields, name) for name in names[role]):
            raise ValueError(
                f"{where} has no {role}; name its field with --{role}. The first record has "
                f"{_described(fields)}."
            )
    return FieldNames(**names), kind


def _described(fields: Fields) -> str:
    inner = []
    for name, value in fields.items():
        content = _json(value) if name == "json" or name.endswith(".json") else None
        inner += [f"{name}/{key}" for key in content] if isinstance(content, dict) else []
    return ", ".join([*fields, *inner]) or "no fields"


def _has(fields: Fields, name: str) -> bool:
    return _value(fields, (name,), {}) is not None


def _json(value: Any) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None


def _value(fields: Fields, names: tuple[str, ...], parsed: dict[str, Any]) -> Any:
    for name in names:
        value = fields.get(name)
        if value is None and "/" in name:
            member, *path = name.split("/")
            if member in fields:
                if member not in parsed:
                    parsed[member] = _json(fields[member])
                value = parsed[member]
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def to_sample(fields: Fields, names: FieldNames, kind: Kind, number: int) -> Sample:
    """Makes a sample of a record.

    Args:
        fields: of the record.
        names: which field is what.
        kind: of the set.
        number: of the record, its key where it has none.

    Returns:
        The sample. Its group is a 31-bit checksum of its captions.

    Raises:
        BadRecordError: "missing image", "missing caption", "empty caption", "encoding",
            "conversation" or "image count".
    """
    parsed: dict[str, Any] = {}
    value = _value(fields, names.key, parsed)
    key = str(number) if value is None else text_of(value, f"record {number}", "key")
    images = _images(_value(fields, names.image, parsed), key)
    if kind == "conversations":
        turns = turns_of(_value(fields, names.conversations, parsed), key, len(images))
        return Sample(key=key, images=images, turns=turns)
    if not images:
        raise BadRecordError("missing image", f"Record {key} has no {' or '.join(names.image)}.")
    value = _value(fields, names.caption, parsed)
    if value is None:
        raise BadRecordError(
            "missing caption", f"Record {key} has no {' or '.join(names.caption)}."
        )
    language = _language(names, fields, parsed, key)
    parts = value if isinstance(value, list) else [value]
    texts = [text_of(part, key, "caption") for part in parts if part is not None]
    captions = tuple(Caption(text, language) for text in texts if text)
    if not captions:
        raise BadRecordError("empty caption", f"The caption of record {key} is empty.")
    group = zlib.crc32("\n".join(caption.text for caption in captions).encode()) & 0x7FFFFFFF
    return Sample(key=key, images=images, captions=captions, group=group)


def text_of(value: Any, key: str, what: str) -> str:
    """A text of a record.

    Args:
        value: str, or bytes in UTF-8; numbers are written out.
        key: of the record.
        what: the text is, for errors.

    Returns:
        The text without white space around it.

    Raises:
        BadRecordError: if it cannot be written in UTF-8.
    """
    try:
        if isinstance(value, bytes):
            return value.decode().strip()
        text = str(value).strip()
        text.encode()  # JSON can hold half a surrogate pair
        return text
    except UnicodeError as error:
        raise BadRecordError("encoding", f"The {what} of record {key} is no UTF-8.") from error


def _images(value: Any, key: str) -> tuple[bytes, ...]:
    parts = value if isinstance(value, list) else [] if value is None else [value]
    for part in parts:
        if not isinstance(part, bytes) or not part:
            raise BadRecordError("missing image", f"The picture of record {key} has no bytes.")
    return tuple(parts)


def _language(names: FieldNames, fields: Fields, parsed: dict[str, Any], key: str) -> str:
    if names.language and names.language[0].startswith("="):
        code = names.language[0][1:]
    else:
        value = _value(fields, names.language, parsed)
        code = "" if value is None else text_of(value, key, "language")
    code = code.replace("_", "-").partition("-")[0].lower()  # zh-CN, pt_BR
    return code if code in LANGUAGES else ""


def turns_of(value: Any, key: str, images: int) -> tuple[Turn, ...]:
    """The turns of a conversation as LLaVA writes them.

    A turn of the model before the first of the human is dropped, and where no turn says where the
    pictures come they come first, both as in LLaVA.

    Args:
        value: list of {from, value}, or its JSON.
        key: of the record.
        images: number of its pictures.

    Returns:
        The turns, beginning with the human's and ending with the model's.

    Raises:
        BadRecordError: "conversation" if it is none, "image count" if the pictures do not fit.
    """
    value = _json(value) if isinstance(value, str | bytes) else value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BadRecordError("conversation", f"Record {key} has no list of turns.")
    turns = []
    for part in value:
        speaker = part.get("from") or part.get("role")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        said = part.get("value", part.get("content"))
        if role is None or not isinstance(said, str):
            raise BadRecordError("conversation", f"A turn of record {key} has no role or no text.")
        turns.append(Turn(role, text_of(said, key, "conversation")))
    turns = turns[1:] if turns and turns[0].role == "gpt" else turns
    wanted = ("human", "gpt") * (len(turns) // 2)
    if not turns or tuple(turn.role for turn in turns) != wanted:
        raise BadRecordError("conversation", f"The turns of record {key} do not alternate.")
    named = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if images and not named:
        first = (IMAGE_PLACEHOLDER + "\n") * images + turns[0].value
        turns[0], named = Turn("human", first), images
    if named != images:
        raise BadRecordError(
            "image count", f"Record {key} has {images} pictures and {named} {IMAGE_PLACEHOLDER}."
        )
    return tuple(turns)
