"""Language identification behind one small interface; the models are the user's to install."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.clean.config import Language
from data_pipelines.clean.signals import Rule
from data_pipelines.metadata.kernels import pc
from internvl_jax.config import ConfigError

Identifier = Callable[[Sequence[str]], Sequence[str | None]]
"""Captions -> their codes, e.g. "en"; None where it is not sure."""


def _fasttext(model: str) -> Identifier:
    """fastText's language models (https://fasttext.cc/docs/en/language-identification.html)."""
    try:
        import fasttext
    except ImportError:
        raise ConfigError("config.language asks for fastText: pip install fasttext.") from None
    classifier = fasttext.load_model(model)

    def identify(captions: Sequence[str]) -> list[str | None]:
        labels, shares = classifier.predict([c.replace("\n", " ") for c in captions])
        return [
            label[0].removeprefix("__label__") if share[0] >= 0.5 else None
            for label, share in zip(labels, shares)
        ]

    return identify


def _lingua(model: str) -> Identifier:
    """lingua (https://pypi.org/project/lingua-language-detector/)."""
    try:
        import lingua
    except ImportError:
        raise ConfigError(
            "config.language asks for lingua: pip install lingua-language-detector."
        ) from None
    detector = lingua.LanguageDetectorBuilder.from_all_languages().build()

    def identify(captions: Sequence[str]) -> list[str | None]:
        found = detector.detect_languages_in_parallel_of(list(captions))
        return [None if f is None else f.iso_code_639_1.name.lower() for f in found]

    return identify


IDENTIFIERS: dict[str, Callable[[str], Identifier]] = {"fasttext": _fasttext, "lingua": _lingua}


@functools.lru_cache(maxsize=1)  # one model for all sources of a process
def _identifier(name: str, model: str) -> Identifier:
    if name not in IDENTIFIERS:
        raise ConfigError(
            f"config.language.identifier is {name!r}: use {', '.join(IDENTIFIERS)}, or none."
        )
    return IDENTIFIERS[name](model)


def rules(settings: Language) -> Iterator[Rule]:
    """Drops captions of languages that are not kept; what is not known is kept.

    Args:
        settings: see `config.Language`.

    Yields:
        One rule, or none.
    """
    if not settings.keep:
        return
    keep = pa.array(settings.keep, pa.string())

    def other(batch: Any) -> Any:
        codes = batch.column("lang")
        if settings.identifier and codes.null_count:
            unknown = codes.is_null()
            captions = pc.fill_null(batch.column("caption").filter(unknown), "").to_pylist()
            found = _identifier(settings.identifier, settings.model)(captions)
            codes = pc.replace_with_mask(codes, unknown, pa.array(found, pa.string()))
        return pc.and_(codes.is_valid(), pc.invert(pc.is_in(codes, keep)))

    yield "language", ("lang", "caption") if settings.identifier else ("lang",), other
