"""The settings of cleaning: frozen dataclasses made of a ConfigDict that holds data only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import ConfigError, build

RULES_VERSION = 1
"""Counts up when a rule, a key or the output changes: outputs of two versions do not mix."""
KEYS = ("url", "url_caption", "caption", "sha256", "phash")


@dataclasses.dataclass(frozen=True)
class Signals:
    """Stage 1's six signals; None switches a rule off, a null in the data is no opinion.

    Attributes:
        similarity: least cosine of CLIP's picture and text.
        watermark: most probable watermark.
        unsafe: most probable unsafe picture.
        aesthetic: least aesthetic score, 0 to 10.
        side: least shorter side in pixels.
        aspect: greatest longer side over shorter side.
        least_chars: characters of the caption, outer white space not counted.
        most_chars: likewise.
    """

    similarity: float | None = None
    watermark: float | None = None
    unsafe: float | None = None
    aesthetic: float | None = None
    side: int | None = None
    aspect: float | None = None
    least_chars: int | None = None
    most_chars: int | None = None


@dataclasses.dataclass(frozen=True)
class Captions:
    """Stage 2's rules on the caption; None or False switches one off.

    Lengths count a Chinese, Japanese or Korean character as two, since it says about as much.

    Attributes:
        least: shortest caption.
        most: longest caption.
        complete: drop captions that break off, e.g. with "..." or "with the".
        letters: least share of letters among the characters that are no space, in any script.
        gibberish: drop random letters and digits, e.g. "xkcdfghjklmn" or "3fa81c02be77".
        boilerplate: drop menus, messages and other text of web pages.
        repetition: greatest share of one word (or Chinese character) in a caption where it
            stands at least four times; also six equal characters in a row.
        offensive: drop captions with words of `patterns.OFFENSIVE`.
        offensive_words: further ones.
        placeholders: drop names of files, "image 1", "lorem ipsum" and the like.
        code: drop markup, code and addresses.
    """

    least: int | None = None
    most: int | None = None
    complete: bool = False
    letters: float | None = None
    gibberish: bool = False
    boilerplate: bool = False
    repetition: float | None = None
    offensive: bool = False
    offensive_words: tuple[str, ...] = ()
    placeholders: bool = False
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Language:
    """Captions of other languages are dropped.

    Attributes:
        keep: codes to keep, () for all.
        identifier: says the language where the source does not: "" for none (no opinion),
            "fasttext" or "lingua" (install them yourself).
        model: path of fastText's model file.
    """

    keep: tuple[str, ...] = ()
    identifier: str = ""
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Contamination:
    """Rows that evaluation sets hold too are dropped.

    Attributes:
        list: file that `python -m data_pipelines.clean.decontaminate` wrote, "" for none.
        distance: most differing bits of two perceptual hashes of one picture.
    """

    list: str = ""
    distance: int = 2


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Of rows that are the same, the first in the order of the corpus stays: the order of
    `CleanConfig.order`, then of the file's path, then of the row.

    Attributes:
        keys: what makes rows the same, of `KEYS`; each on its own.
        distance: most differing bits of two perceptual hashes; 0 asks for equality. Needs "phash"
            among the keys.
        bands: into which hashes are cut to find them; more than `distance`.
        caption_count: captions that occur more often are dropped altogether; None for no limit.
        captions_of: sources whose captions are compared or counted, () for all. Captions of
            curated or generated sources are alike without being of no use.
        partitions: of the keys; one is held in memory at a time, 16 bytes a row and as much again.
    """

    keys: tuple[str, ...] = ("url",)
    distance: int = 0
    bands: int = 4
    caption_count: int | None = None
    captions_of: tuple[str, ...] = ()
    partitions: int = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of the corpus.

    Attributes:
        files: a path with "*", or several.
        reader: its layout, a key of `metadata.layouts.LAYOUTS`; "" is the source's own name.
        signals: settings that differ from `CleanConfig.signals`.
        captions: settings that differ from `CleanConfig.captions`.
    """

    files: tuple[str, ...] | str
    reader: str = ""
    signals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    captions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The paths."""
        return (self.files,) if isinstance(self.files, str) else self.files


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """A run of `python -m data_pipelines.clean`.

    Attributes:
        stage: 1 or 2, the column of the paper's Table 2 that the report compares with.
        output: folder that is written.
        order: names of the sources that are read; earlier ones keep what both have.
        sources: name -> source.
        drop_uids: .npy files of [n] 16-byte uids to drop, e.g. of `clean.semantic`.
        malformed: greatest share of lines that cannot be parsed, above it the run ends with 65.
        driver: "local" or "beam".
        workers: processes of the local driver.
        examples: captions per reason, source and part that are kept for the report.
    """

    stage: int
    output: str
    order: tuple[str, ...]
    sources: Mapping[str, Source]
    signals: Signals = Signals()
    captions: Captions = Captions()
    language: Language = Language()
    contamination: Contamination = Contamination()
    duplicates: Duplicates = Duplicates()
    drop_uids: tuple[str, ...] = ()
    malformed: float = 0.01
    driver: str = "local"
    workers: int = 1
    examples: int = 3

    def __post_init__(self):
        _require(self.stage in (1, 2), f"config.stage is {self.stage}: use 1 or 2.")
        _require(bool(self.order), "config.order is empty: name the sources to read.")
        for name in self.order:
            _require(
                name in self.sources,
                f"config.order names {name!r}, config.sources has {', '.join(self.sources)}.",
            )
        _require(
            len({*self.order}) == len(self.order),
            "config.order names a source twice: once is enough.",
        )
        keys = self.duplicates.keys
        for key in keys:
            _require(key in KEYS, f"config.duplicates.keys has {key!r}: use {', '.join(KEYS)}.")
        distance, bands = self.duplicates.distance, self.duplicates.bands
        _require(
            0 <= distance < bands <= 16,
            f"config.duplicates.distance is {distance} with {bands} bands: it must be less, "
            "and 16 bands are the most.",
        )
        _require(
            distance == 0 or "phash" in keys,
            "config.duplicates.distance needs 'phash' in config.duplicates.keys.",
        )
        _require(
            0 <= self.contamination.distance <= 3,
            f"config.contamination.distance is {self.contamination.distance}: use 0 to 3.",
        )
        _require(
            1 <= self.duplicates.partitions <= 65536 and self.workers >= 1,
            "config.duplicates.partitions must be 1 to 65536, config.workers at least 1.",
        )
        _require(
            self.driver in ("local", "beam"),
            f"config.driver is {self.driver!r}: use local or beam.",
        )
        for name in self.order:  # so that a misspelt setting is seen before the work
            self.rules_of(name)

    def rules_of(self, name: str) -> tuple[Signals, Captions]:
        """The settings that hold for one source."""
        source, where = self.sources[name], f"config.sources.{name}"
        signals = {**dataclasses.asdict(self.signals), **source.signals}
        captions = {**dataclasses.asdict(self.captions), **source.captions}
        return (
            build(Signals, signals, f"{where}.signals"),
            build(Captions, captions, f"{where}.captions"),
        )

    def digest(self) -> str:
        """Names what decides the output: every setting but who does the work and where."""
        values = dataclasses.asdict(self)
        for name in ("output", "driver", "workers", "malformed"):
            del values[name]
        values["sources"] = {name: values["sources"][name] for name in self.order}
        for source in values["sources"].values():
            del source["files"]  # their names and sizes are compared by `steps`
        del values["duplicates"]["partitions"], values["duplicates"]["bands"]
        text = json.dumps([RULES_VERSION, values], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
