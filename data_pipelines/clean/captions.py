"""Stage 2's rules, on the caption alone (paper's appendix; its thresholds are not published).

They count letters of every script, so that Chinese or Arabic is as readable as English.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.clean import patterns
from data_pipelines.clean.config import Captions
from data_pipelines.clean.signals import Rule
from data_pipelines.metadata.kernels import pc

# RE2 has no back-reference: six of one sign in a row are spelt out for what is found in practice.
_RUN = "|".join(f"{re.escape(c)}{{6,}}" for c in "abcdefghijklmnopqrstuvwxyz0123456789!?.-_=*#~+")
_LEAST_TIMES = 4


def rules(settings: Captions) -> Iterator[Rule]:
    """The rules that are switched on, the cheapest first.

    Args:
        settings: thresholds and switches.

    Yields:
        See `signals.Rule`.
    """
    s = settings
    words = (re.escape(word) for word in s.offensive_words)
    offensive = (*patterns.OFFENSIVE, *(rf"\b{word}\b" for word in words))
    matched: tuple[tuple[str, bool, Sequence[str]], ...] = (
        ("placeholder", s.placeholders, patterns.PLACEHOLDERS),
        ("incomplete", s.complete, patterns.CUT_OFF),
        ("code", s.code, patterns.CODE),
        ("boilerplate", s.boilerplate, patterns.BOILERPLATE),
        ("offensive", s.offensive, offensive),
        ("gibberish", s.gibberish, patterns.GIBBERISH),
    )
    if s.least is not None or s.most is not None:
        low, high = s.least or 0, s.most or 2**31 - 1
        yield "caption_size", ("caption",), lambda b: _outside(b.column("caption"), low, high)
    for reason, wanted, entries in matched:
        if wanted:
            yield reason, ("caption",), _Matches(entries)
    if s.letters is not None:
        share = s.letters
        yield "unreadable", ("caption",), lambda b: _few_letters(b.column("caption"), share)
    if s.repetition is not None:
        most = s.repetition
        yield "repetition", ("caption",), lambda b: _repeats(b.column("caption"), most)


class _Matches:
    def __init__(self, entries: Sequence[str]):
        self.pattern = "|".join(f"(?:{entry})" for entry in entries)

    def __call__(self, batch: Any) -> Any:
        return pc.match_substring_regex(batch.column("caption"), self.pattern, ignore_case=True)


def _outside(captions: Any, low: int, high: int) -> Any:
    length = pc.add(
        pc.utf8_length(pc.utf8_trim_whitespace(captions)),
        _length_without(captions, f"[^{patterns.WIDE}]+"),
    )
    return pc.or_(pc.less(length, low), pc.greater(length, high))


def _length_without(captions: Any, pattern: str) -> Any:
    # Removing runs is several times faster than counting characters one by one.
    return pc.utf8_length(pc.replace_substring_regex(captions, pattern, ""))


def _few_letters(captions: Any, share: float) -> Any:
    # Marks are parts of letters: vowel signs of Hindi and Thai, accents.
    letters = _length_without(captions, r"[^\p{L}\p{M}]+")
    signs = _length_without(captions, r"\s+")
    limit = pc.multiply(pc.cast(signs, pa.float64()), pa.scalar(share, pa.float64()))
    return pc.less(pc.cast(letters, pa.float64()), limit)


def split_words(captions: Any) -> Any:
    """Lower-case words; a Chinese or Japanese character is a word, as they are not spaced.

    Args:
        captions: Arrow string array [n].

    Returns:
        Arrow array [n] of lists of strings.
    """
    lower = pc.utf8_lower(captions)
    spaced = pc.replace_substring_regex(
        lower, r"([\p{Han}\p{Hiragana}\p{Katakana}])|[^\p{L}\p{M}\p{N}]+", r" \1 "
    )
    return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(spaced))


def _repeats(captions: Any, most: float) -> Any:
    """A word that stands four times and makes up more than a share of the caption."""
    run = pc.match_substring_regex(captions, _RUN, ignore_case=True)
    words = split_words(captions)
    rows = pc.list_parent_indices(words).to_numpy()
    coded = pc.dictionary_encode(pc.list_flatten(words)).indices.to_numpy()
    found, counts = np.unique(rows.astype(np.int64) << 32 | coded, return_counts=True)
    top = np.zeros(len(captions), np.int64)
    np.maximum.at(top, found >> 32, counts)
    total = np.bincount(rows, minlength=len(captions))
    return pc.or_(run, pa.array((top >= _LEAST_TIMES) & (top > most * total)))
