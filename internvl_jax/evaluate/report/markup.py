"""HTML and SVG as nested calls: text is escaped, elements are not."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_VOID = frozenset(("img", "br", "meta", "circle", "line", "polyline"))


class Markup(str):
    """Text that is markup already."""


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def element(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: texts (escaped), elements, or nested sequences of them; None is nothing.
        attributes: ``class_`` and ``for_`` lose their underscore, others turn ``_`` into ``-``;
            None is left out.

    Returns:
        The element's markup.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{pairs}/>")
    return Markup(f"<{name}{pairs}>{fragment(*children)}</{name}>")


def fragment(*children: Child) -> Markup:
    """Children one after another, as `element` takes them."""
    out = []
    for child in children:
        if isinstance(child, Markup):
            out.append(child)
        elif isinstance(child, str):
            out.append(_escape(child))
        elif isinstance(child, Iterable):
            out.append(fragment(*child))
        elif child is not None:
            out.append(_escape(str(child)))
    return Markup("".join(out))


def picture(png: str, alt: str, size: int, class_: str | None = None) -> Markup:
    """A picture that is part of the page.

    Args:
        png: base64 of the PNG.
        alt: what it shows.
        size: side on the page in CSS pixels.
        class_: of the element.
    """
    return element(
        "img", src=f"data:image/png;base64,{png}", alt=alt, width=size, height=size, class_=class_
    )


def phrase(text: str, language: str, class_: str | None = None, name: str = "span") -> Markup:
    """A text in some language, in its own direction."""
    return element(name, text, lang=language, dir="auto", class_=class_)


def _escape(text: str) -> str:
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))
