"""Rows that evaluation sets hold too: ``python -m data_pipelines.clean.decontaminate --help``.

The list holds perceptual hashes of the sets' pictures and hashes of runs of words of their
captions. A caption is contaminated if it shares 13 words in a row, or, being shorter, all its
words (but at least eight); the numbers are settings of the list.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.clean.config import Contamination
from internvl_jax.config import ConfigError

WORDS, LEAST_WORDS = 13, 8
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_CAPTION_KEYS = {"caption", "captions", "raw", "caption_str", "reference_strs"}


@dataclasses.dataclass(frozen=True)
class Listed:
    """What evaluation sets hold.

    Attributes:
        phashes: [m] uint64, ascending, each once.
        runs: [r] uint64 hashes of runs of words, ascending, each once.
        words: length of a run.
        least_words: a caption shorter than a run counts as one from this length on.
    """

    phashes: np.ndarray
    runs: np.ndarray
    words: int = WORDS
    least_words: int = LEAST_WORDS

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the list, whole or not at all."""
        writing = f"{path}.tmp"
        with open(writing, "wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        os.replace(writing, path)

    @classmethod
    def load(cls, path: str) -> Listed:
        """Reads a list.

        Raises:
            ConfigError: if there is none.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(
                    file["phashes"], file["runs"], int(file["words"]), int(file["least_words"])
                )
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"config.contamination.list {path} cannot be read ({error}): write it with "
                "python -m data_pipelines.clean.decontaminate."
            ) from error


def word_runs(captions: Any, words: int, least_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every run of words of captions.

    Args:
        captions: Arrow string array [n].
        words: length of a run.
        least_words: a shorter caption is one run if it has as many words.

    Returns:
        Rows [r] int64 and their runs' hashes [r] uint64. A Chinese or Japanese character is a word.
    """

    from data_pipelines.clean.captions import split_words
    from data_pipelines.metadata.kernels import pc
    from data_pipelines.metadata.keys import combine, hash_strings

    split = split_words(captions)
    lengths = pc.fill_null(pc.list_value_length(split), 0).to_numpy(zero_copy_only=False)
    hashes = hash_strings(pc.list_flatten(split), seed=5)
    begins = np.cumsum(lengths) - lengths
    runs = np.where(lengths >= words, lengths - words + 1, (lengths >= least_words).astype(int))
    rows = np.repeat(np.arange(len(lengths)), runs)
    starts = begins[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(runs) - runs, runs)
    sizes = np.minimum(lengths[rows], words)
    made = sizes.astype(np.uint64)
    for place in range(words):
        longer = np.flatnonzero(sizes > place)
        made[longer] = combine(made[longer], hashes[starts[longer] + place])
    return rows, made


def rules(settings: Contamination) -> Iterator[Any]:
    """The rules of a list.

    Args:
        settings: see `config.Contamination`.

    Yields:
        See `signals.Rule`.

    Raises:
        ConfigError: if the list cannot be read.
    """
    import pyarrow as pa

    from data_pipelines.clean.duplicates import NearIndex
    from data_pipelines.metadata.kernels import pc

    if not settings.list:
        return
    listed = Listed.load(settings.list)
    if len(listed.phashes):
        index = NearIndex(listed.phashes, settings.distance)

        def pictures(batch: Any) -> Any:
            hashes = batch.column("phash")
            valid = hashes.is_valid().to_numpy(zero_copy_only=False)
            found = np.zeros(len(hashes), bool)
            found[valid] = index(hashes.drop_null().to_numpy())
            return pa.array(found)

        yield "contaminated_picture", ("phash",), pictures
    if len(listed.runs):

        def captions(batch: Any) -> Any:
            texts = pc.fill_null(batch.column("caption"), "")
            rows, runs = word_runs(texts, listed.words, listed.least_words)
            place = np.minimum(np.searchsorted(listed.runs, runs), len(listed.runs) - 1)
            found = np.zeros(len(texts), bool)
            found[rows[listed.runs[place] == runs]] = True
            return pa.array(found)

        yield "contaminated_caption", ("caption",), captions


def make_list(
    pictures: Sequence[pathlib.Path], captions: Sequence[str], words: int, least_words: int
) -> tuple[Listed, list[str]]:
    """Makes the list of some evaluation sets.

    Args:
        pictures: files.
        captions: texts.
        words: length of a run.
        least_words: see `Listed`.

    Returns:
        The list, and sentences on the pictures that could not be read.
    """
    import pyarrow as pa
    from PIL import Image

    from data_pipelines.clean.phash import phash

    hashes, bad = [], []
    started = shown = time.monotonic()
    for done, path in enumerate(pictures, 1):
        try:
            with Image.open(path) as image:
                hashes.append(phash(np.asarray(image.convert("RGB"))))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path} cannot be read ({error}); it was left out.")
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            rate = done / (shown - started)
            left = (len(pictures) - done) / rate
            print(f"{done} of {len(pictures)} pictures, {rate:.0f}/s, {left:.0f} s left")
    runs = word_runs(pa.array(captions, pa.string()), words, least_words)[1]
    unique = np.unique(np.array(hashes, np.uint64))
    return Listed(unique, np.unique(runs), words, least_words), bad


def read_captions(path: pathlib.Path) -> list[str]:
    """Captions of a file: the lines of a text, or what a JSON calls caption, at any depth.

    Args:
        path: .json, or a text file.
    """
    if path.suffix != ".json":
        return path.read_text("utf-8").splitlines()
    found: list[str] = []

    def walk(value: Any, wanted: bool) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, key in _CAPTION_KEYS)
        elif isinstance(value, list):
            for child in value:
                walk(child, wanted)
        elif wanted and isinstance(value, str):
            found.append(value)

    walk(json.loads(path.read_text("utf-8")), False)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 done, 65 no picture could be read, 78 something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.clean.decontaminate",
        description="Writes the list of what evaluation sets hold, for config.contamination.list.",
    )
    parser.add_argument("--pictures", type=pathlib.Path, nargs="*", default=[], help="folders")
    parser.add_argument("--captions", type=pathlib.Path, nargs="*", default=[], help=".txt, .json")
    parser.add_argument("--words", type=int, default=WORDS, help="of a run")
    parser.add_argument("--least_words", type=int, default=LEAST_WORDS, help="of a short caption")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="e.g. evaluation.npz")
    options = parser.parse_args(arguments)
    try:
        for folder in options.pictures:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is no folder: check --pictures.")
        files = sorted(
            p for f in options.pictures for p in f.rglob("*") if p.suffix.lower() in PICTURES
        )
        captions = [text for path in options.captions for text in read_captions(path)]
        if not files and not captions:
            raise ValueError("Nothing to list: give --pictures or --captions that hold some.")
        listed, bad = make_list(files, captions, options.words, options.least_words)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        listed.save(options.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 78
    for sentence in bad:
        print(sentence, file=sys.stderr)
    print(
        f"{options.out}: {len(listed.phashes)} hashes of {len(files) - len(bad)} pictures, "
        f"{len(listed.runs)} runs of words of {len(captions)} captions"
    )
    return 65 if files and len(bad) == len(files) else 0


if __name__ == "__main__":
    sys.exit(main())
