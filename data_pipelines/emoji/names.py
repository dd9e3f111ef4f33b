"""Concepts with their names and keywords, out of Unicode CLDR's annotations."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.emoji.fetch import read_json
from internvl_jax.batch import LANGUAGES

SKIN_TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
VARIATION_SELECTOR = 0xFE0F


def concept_key(text: str) -> str:
    """The code points of an emoji, as file names and icon sets write them.

    Args:
        text: the emoji.

    Returns:
        e.g. "1f468-200d-1f33e"; variation selectors are left out.
    """
    return "-".join(f"{ord(char):x}" for char in text if ord(char) != VARIATION_SELECTOR)


def read_annotations(archives: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """Names and keywords in every language of `LANGUAGES`.

    Args:
        archives: of the packages "names" and "derived".

    Returns:
        language -> concept key -> ``{"name": str, "keywords": [str]}``; skin tones are left out.
    """
    out: dict[str, dict[str, Any]] = {language: {} for language in LANGUAGES}
    # The derived annotations are of sequences; a name of its own comes before a derived one.
    for package, folder in (("derived", "annotationsDerived"), ("names", "annotations")):
        members = {language: f"{folder}/{language}/annotations.json" for language in LANGUAGES}
        files = read_json(archives[package], list(members.values()))
        for language, member in members.items():
            for text, entry in files[member][folder]["annotations"].items():
                key = concept_key(text)
                if "tts" not in entry or SKIN_TONES & set(key.split("-")):
                    continue
                name = entry["tts"][0].strip()
                words = [word.strip() for word in entry.get("default", ()) if word.strip()]
                out[language][key] = {"name": name, "keywords": words}
    return out


def named_in(annotations: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, str]:
    """A concept's names.

    Args:
        annotations: from `read_annotations`.
        key: the concept.

    Returns:
        language -> name, in the order of `LANGUAGES`.
    """
    return {
        language: entries[key]["name"]
        for language, entries in annotations.items()
        if key in entries
    }


def keywords_in(annotations: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, tuple]:
    """A concept's keywords.

    Args:
        annotations: from `read_annotations`.
        key: the concept.

    Returns:
        language -> keywords, in the order of `LANGUAGES`.
    """
    return {
        language: tuple(entries[key]["keywords"])
        for language, entries in annotations.items()
        if key in entries
    }


def without_skin_tones(keys: Iterable[str]) -> list[str]:
    """The keys of base emoji.

    Args:
        keys: concept keys.

    Returns:
        Those without a skin tone, sorted.
    """
    return sorted(key for key in set(keys) if not SKIN_TONES & set(key.split("-")))
