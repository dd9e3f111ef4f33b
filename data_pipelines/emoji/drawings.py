"""Vendors' drawings: icon sets of SVG bodies, and their rasterisation."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.emoji.fetch import read_json

TRAINING_VENDORS = ("noto", "twemoji", "emojione")
HELD_OUT_VENDOR = "fluent"
SIZE = 64
MAX_SVG = 1 << 20


class IconSet:
    """One vendor's icons in Iconify's JSON format.

    Attributes:
        vendor: its name.
        chars: concept key -> icon name; empty where the package lists none.
    """

    def __init__(self, vendor: str, archive: pathlib.Path):
        """Reads the package.

        Args:
            vendor: its name.
            archive: the package.
        """
        files = read_json(archive, ["icons.json", "chars.json", "metadata.json"])
        self.vendor = vendor
        self._icons: dict[str, Any] = files["icons.json"]["icons"]
        self._aliases: dict[str, Any] = files["icons.json"].get("aliases", {})
        self._width = files["icons.json"].get("width", 16)
        self._height = files["icons.json"].get("height", 16)
        self.chars: dict[str, str] = files["chars.json"]
        self._groups = {
            icon: group
            for group, icons in files["metadata.json"].get("categories", {}).items()
            for icon in icons
        }

    def __contains__(self, icon: str) -> bool:
        return icon in self._icons or icon in self._aliases

    def group(self, key: str) -> str | None:
        """The category a concept is in.

        Args:
            key: the concept.

        Returns:
            e.g. "Food & Drink", or None if the vendor does not say.
        """
        icon = self.chars.get(key, "")
        parent = self._aliases.get(icon, {}).get("parent", "")
        return self._groups.get(icon) or self._groups.get(parent)

    def synonyms(self, key: str) -> list[str]:
        """Every name the vendor has for a concept's icon.

        Args:
            key: the concept.

        Returns:
            Names, the main one first.
        """
        icon = self.chars.get(key)
        if icon is None:
            return []
        return [icon, *(alias for alias, to in self._aliases.items() if to["parent"] == icon)]

    def root(self, icon: str) -> str:
        """What an icon is an alias of, itself if of none.

        Args:
            icon: name or alias.

        Returns:
            The name of the drawing.
        """
        while icon not in self._icons:
            icon = self._aliases[icon]["parent"]
        return icon

    def svg(self, icon: str) -> bytes:
        """An icon as a document of its own, drawn to fit `SIZE` pixels.

        Args:
            icon: name or alias; an alias may be turned or mirrored.

        Returns:
            The SVG.
        """
        changes: dict[str, Any] = {}
        while icon not in self._icons:
            changes = {**self._aliases[icon], **changes}
            icon = self._aliases[icon]["parent"]
        entry = {**self._icons[icon], **changes}
        width = entry.get("width", self._width)
        height = entry.get("height", self._height)
        left, top = entry.get("left", 0), entry.get("top", 0)
        body = entry["body"]
        if entry.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        if entry.get("vFlip"):
            body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
        if entry.get("rotate"):
            centre = f"{left + width / 2} {top + height / 2}"
            body = f'<g transform="rotate({90 * entry["rotate"]} {centre})">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{body}</svg>'
        ).encode()


def slug(name: str) -> str:
    """A name as icon sets spell it.

    Args:
        name: e.g. "man’s shoe".

    Returns:
        e.g. "mans-shoe".
    """
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    plain = re.sub("[’']", "", plain.lower())
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def find_icons(
    sets: Mapping[str, IconSet], keys: Iterable[str], english: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Which icon of which vendor draws a concept.

    EmojiOne's package has no table of code points; its icons are found by the English name and by
    the other vendors' names for the same concept. Where two concepts find one icon so ("cricket",
    the insect and the game), neither gets it.

    Args:
        sets: vendor -> icons.
        keys: the concepts.
        english: concept -> English name.

    Returns:
        concept -> vendor -> icon.
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        names = [slug(english[key])]
        for icons in sets.values():
            names += icons.synonyms(key)
        names += [name.replace("flag-", "flag-for-", 1) for name in names]
        found[key] = {}
        for vendor, icons in sets.items():
            if icons.chars:
                icon = icons.chars.get(key)
            else:
                icon = next((name for name in names if name in icons), None)
            if icon is not None and icon in icons:
                found[key][vendor] = icon
    for vendor, icons in sets.items():
        if not icons.chars:
            roots = {key: icons.root(of[vendor]) for key, of in found.items() if vendor in of}
            claims = collections.Counter(roots.values())
            for key, root in roots.items():
                if claims[root] > 1:
                    del found[key][vendor]
    return found


def rasterise(svg: bytes) -> bytes:
    """Draws an SVG on white.

    Args:
        svg: the document.

    Returns:
        PNG data, `SIZE` x `SIZE` RGB.

    Raises:
        ValueError: if it is too large or cannot be drawn.
    """
    # One small picture has nothing to share among threads; must be set before vips starts.
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    if len(svg) > MAX_SVG:
        raise ValueError(f"A drawing has {len(svg)} bytes of SVG, more than {MAX_SVG}.")
    try:
        image = pyvips.Image.svgload_buffer(svg)
        if (image.width, image.height) != (SIZE, SIZE):
            raise ValueError(f"A drawing came out as {image.width} x {image.height} pixels.")
        # flatten weighs by alpha, so soft edges do not get a dark rim.
        return image.flatten(background=[255, 255, 255]).pngsave_buffer(compression=6)
    except pyvips.Error as error:
        raise ValueError(f"A drawing cannot be rasterised ({error}).") from error
